"""Training on this project's own parts: a correct average, the same bits on one worker and on two, a falling loss."""

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent


def train(folder: Path, *overrides: str) -> dict[str, object]:
    """The summary of a short run of the project's experiment."""
    command = [sys.executable, "-m", "mbgd", "train", "experiment=first", f"run.dir={folder}", *overrides]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return summary


def test_the_average_is_right_on_these_parts() -> None:
    """Every step of three workers equals plain torch on one; if not, the last lines give the reasons found."""
    command = [sys.executable, "-m", "mbgd", "verify", "experiment=first", "--steps", "2"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_bits_on_one_worker_and_on_two(tmp_path: Path) -> None:
    one = train(tmp_path / "one", "averaging=reproducible", "steps=20", "workers=1")
    two = train(tmp_path / "two", "averaging=reproducible", "steps=20", "workers=2")
    assert one["weights_sha256"] == two["weights_sha256"]
    lines = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
