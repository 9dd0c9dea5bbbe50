"""What a user sees of an exception: their own lines, and few."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mbgd
from mbgd.cli import tracebacks
from mbgd.cli.tracebacks import of_ours, of_user

SOURCE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def forward(self, x):
        return self.layer(x)

class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.tensor([1.0, 2.0, 3.0]) / {"no": 1}["yes"]

def through_torch():
    Net()(torch.zeros(2, 5))

def deep(depth=60):
    return deep(depth - 1) if depth else 1 / 0

def two(depth=60):
    return three(depth - 1) if depth else 1 / 0

def three(depth):
    return two(depth - 1) if depth else 1 / 0

def chained():
    try:
        {}["key"]
    except KeyError as error:
        raise RuntimeError("no key") from error

def long():
    raise ValueError("\\n".join(f"line {number}" for number in range(100)))

def in_a_loader():
    next(iter(torch.utils.data.DataLoader(Examples(), num_workers=1)))
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("theirs") / "theirs.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("theirs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["theirs"] = module
    spec.loader.exec_module(module)
    return module


def raised(function: Callable[[], object]) -> BaseException:
    """What it raises, without this test's own frame."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        function()
    mine = caught.value.__traceback__
    assert mine is not None
    return caught.value.with_traceback(mine.tb_next)


@pytest.mark.parametrize(
    ("name", "first", "last", "most"),
    [
        ("through_torch", "in through_torch", "RuntimeError: mat1 and mat2 shapes cannot be multiplied", 6),
        ("deep", "in deep", "ZeroDivisionError: division by zero", 15),
        ("two", "in two", "ZeroDivisionError: division by zero", 15),
        ("chained", "in chained", "caused by KeyError: 'key', ", 5),
        ("long", "in long", "…", 12),
        ("in_a_loader", "in __getitem__", "KeyError: 'yes'", 5),
    ],
)
def test_only_the_users_lines_are_shown(theirs: ModuleType, name: str, first: str, last: str, most: int) -> None:
    told = of_user(raised(getattr(theirs, name)))
    lines = told.splitlines()
    assert len(lines) <= most
    assert first in lines[1]
    assert last in lines[-1]
    files = {line.split('"')[1] for line in lines if line.startswith('  File "')}
    assert files == {theirs.__file__}


def test_without_a_part_of_the_users_in_it_the_end_of_ours_is_shown() -> None:
    error = raised(lambda: torch.zeros(2) @ torch.zeros(3)).with_traceback(None)
    assert of_user(error) == ""
    assert of_ours(error).splitlines()[-1].startswith("RuntimeError: ")


def test_this_folder_is_not_among_those_that_are_left_out() -> None:
    assert not tracebacks._is_around(str(Path(__file__)))
    assert tracebacks._is_around(torch.nn.__file__)
    assert tracebacks._is_around(mbgd.__file__)
