"""The projects in examples/: mbgd gives the numbers of the plain torch loop beside it, on one worker and on two."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbgd import Workers
from mbgd.batches.loader import augmentation_keys

from processes import run_workers

ROOT = Path(__file__).parent.parent
IMAGES = Path("/usr/share/datasets/fashion-mnist")
NEEDS_IMAGES = pytest.mark.skipif(not IMAGES.is_dir(), reason="the package dataset-fashion-mnist is not installed")

SHORT = {
    "gpt2_sums": {"steps": 8},
    "fashion_shifted": {"num_examples": 640},
    "house_prices": {"epochs": 1},
    "two_towers": {"epochs": 1},
    "clip_fashion": {"steps": 3},
}
"""Options of a short training, by example."""

EXAMPLES = [pytest.param(name, marks=NEEDS_IMAGES if "fashion" in name else ()) for name in SHORT]


def key_in_first_epoch(index: int) -> int:
    return int(augmentation_keys(0, 0, np.array([index]))[0])


def options(name: str, folder: Path) -> dict[str, Any]:
    if name == "house_prices":
        path = folder / "houses.csv"
        import_module(name).write_houses(path)
        return {"path": path}
    return {}


def trained(workers: Workers, name: str, given: dict[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = import_module(name).train(workers, **given)
    return metrics


def plain(name: str, **given: Any) -> dict[str, float]:
    loop: Callable[..., dict[str, float]] = import_module(name).plain_torch
    return loop(**given, **({"key_of": key_in_first_epoch} if name == "fashion_shifted" else {}))


@pytest.mark.parametrize("name", EXAMPLES)
def test_mbgd_gives_the_numbers_of_plain_torch(name: str, tmp_path: Path) -> None:
    own = options(name, tmp_path)
    untrained = plain(name, **own, **dict.fromkeys(SHORT[name], 0))
    for precision, dtype, tolerance in (("fp64", torch.float64, 1e-12), ("fp32", torch.float32, 1e-6)):
        wanted = plain(name, **own, **SHORT[name], dtype=dtype)
        assert wanted["eval/loss"] < 0.99 * untrained["eval/loss"]
        for num_workers in (1, 2):
            for found in run_workers(trained, num_workers, name, {**own, **SHORT[name], "precision": precision}):
                assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=tolerance), precision


@pytest.mark.parametrize("name", SHORT)
def test_each_example_has_one_command_and_a_section(name: str) -> None:
    source = (ROOT / f"examples/{name}.py").read_text()
    command = f"torchrun --standalone --nproc-per-node 2 examples/{name}.py"
    assert re.findall(r"^    torchrun .*$", source, re.MULTILINE) == [f"    {command}"]
    assert f"    {command}" in (ROOT / "examples/README.md").read_text()
    assert len(source.splitlines()) <= 200


@NEEDS_IMAGES
def test_images_and_captions_reach_the_stated_accuracy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    how: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*command, str(ROOT / "examples/clip_fashion.py")], **how)
    assert done.returncode == 0, done.stderr
    before, after, nearest = (float(one) for one in re.findall(r"([\d.]+)%", done.stdout))
    assert before < 77
    assert after > 84
    assert nearest > 84


def test_the_command_of_an_example(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = str(ROOT / "examples/house_prices.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    how: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, example], **how)
    assert done.returncode == 0, done.stderr
    by_hand = subprocess.run([sys.executable, example, "--plain"], **how)
    losses = [float(re.search(r"^loss ([\d.]+), root", one.stdout, re.MULTILINE)[1]) for one in (done, by_hand)]  # type: ignore[index]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert losses[0] < 0.02
