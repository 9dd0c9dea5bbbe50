"""The examples and the README's commands do what they say."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mbgd

from processes import run_workers

ROOT = Path(__file__).parent.parent
# As a new user has it: OMP_NUM_THREADS is for torchrun and launch/ to set.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {
    "CUDA_VISIBLE_DEVICES": "",  # the commands want more workers than many hosts have GPUs
    "PYTHONPATH": str(ROOT / "examples"),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def run(command: str, folder: Path) -> str:
    installed = 'mbgd() { python -m mbgd "$@"; }; '
    done = subprocess.run(
        ["bash", "-c", installed + command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_library_example_gives_the_same_loss_on_1_and_2_workers(tmp_path: Path) -> None:
    example = ROOT / "examples/library.py"
    alone = run(f"python {example}", tmp_path)
    together = run(f"torchrun --standalone --nproc-per-node 2 {example}", tmp_path)
    losses = [float(re.search(r"evaluation loss ([\d.]+) after 300 steps", out).group(1)) for out in (alone, together)]  # type: ignore[union-attr]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] < 0.1
    assert len([line for line in example.read_text().splitlines() if line.strip()]) < 35


def test_the_example_of_own_parts(tmp_path: Path) -> None:
    docstring = (ROOT / "examples/own_parts.py").read_text().split('"""')[1]
    command = docstring[docstring.index("PYTHONPATH") :].replace("\\\\", "\\").strip()
    out = run(command.replace("train.py", f"train.py run.dir={tmp_path}/out epochs=30"), ROOT)
    assert f"folder      {tmp_path}/out" in out
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def commands_of(page: Path) -> list[str]:
    """The indented commands that train, each on one line."""
    text = page.read_text().replace("\\\n", " ")
    return [
        line.split("#")[0].strip()
        for line in text.splitlines()
        if re.match(r"    (mbgd |python |torchrun |launch/|WORKERS=|PYTHONPATH=)", line)
    ]


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    """From a copy, so that run folders are fresh; the longest are cut to a few steps, `make` and pytest left out."""
    for name in ("train.py", "conf", "hydra_plugins", "launch", "mbgd", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.py").write_text((ROOT / "examples/own_parts.py").read_text() + OWN)
    commands = commands_of(ROOT / "README.md")
    assert len(commands) >= 8
    for command in commands:
        if "make" in shlex.split(command) or "pytest" in command:
            continue
        if "fashion_mnist" in command and not Path("/usr/share/datasets/fashion-mnist").is_dir():
            continue
        shorter = re.sub(r"epochs=\d+", "", command)
        if "train" in command or "launch/" in command:
            shorter += " steps=3"
        out = run(shorter, tmp_path)
        if "compare" in command:
            assert "same bits" in out


OWN = """
Examples = lambda: Spirals(200)
objective = two_class_loss
"""


WORKED = torch.tensor([[1.5, -2.0, 1.1, 0.4, -0.9], [1.2, 2.3, -1.1, -0.8, -0.7]], dtype=torch.float64)


class Slopes(torch.nn.Module):
    """loss_i = θ · v_i, whose gradient is v_i."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return v @ self.theta


def slope(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> mbgd.PerExample:
    return mbgd.PerExample(model(batch[0]))


def step_by_the_mean_gradient(workers: mbgd.Workers) -> list[float]:
    model = Slopes()
    settings = mbgd.Settings(steps=1, batch=mbgd.Batch(size=2), precision=mbgd.Precision.fp64)
    data = mbgd.Data(train=mbgd.InMemory(WORKED, torch.zeros(2)))
    mbgd.Trainer(model, slope, torch.optim.SGD(model.parameters(), lr=1.0), data, settings, workers).fit()
    return [-value for value in model.theta.tolist()]


def test_the_worked_numbers_of_the_documentation() -> None:
    wanted = pytest.approx([1.35, 0.15, 0, -0.2, -0.8], abs=1e-15)
    assert all(got == wanted for got in run_workers(step_by_the_mean_gradient, 2))
    text = (ROOT / "docs/averaging.md").read_text()
    for numbers in ("1.5, −2.0, 1.1, 0.4, −0.9", "1.2, 2.3, −1.1, −0.8, −0.7", "1.35, 0.15, 0, −0.2, −0.8"):
        assert numbers in text
