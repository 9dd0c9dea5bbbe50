"""launch/slurm.sbatch and `mbgd launch slurm` on a real SLURM of two nodes; skipped where SLURM is not installed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mbgd.cli.commands import main

import wandb_files
from hosts import ROOT, SLOW_LOADING, weights_sha256
from slurm import Slurm, cluster

OVERRIDES = ["averaging=reproducible", "batch.size=97", "model.dropout=0.2", "steps=300", "log_every_steps=5"]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with cluster(tmp_path / "slurm") as started:
        yield started


def launch(slurm: Slurm, folder: Path, *arguments: str) -> str:
    """Submit a job on both nodes that loads slowly until the file `fast` is there; its number."""
    (folder / "slow.py").write_text(SLOW_LOADING)
    data = ["data.train._target_=slow.Slow", "~data.train.split", "+data.train.seconds=0.1"]
    data += [f"+data.train.fast={folder / 'fast'}", f"run.dir={folder / 'run'}", "backend.timeout_seconds=8"]
    command = [sys.executable, "-m", "mbgd", "launch", "slurm", "--nodes", "2", "--workers", "1", "--", *OVERRIDES]
    environment = slurm.environment | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_API_KEY": "a secret of the user's", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [*command, *data, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"folder      {folder / 'run'}" in done.stdout
    return next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job "))


def wait_for(slurm: Slurm, folder: Path, condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        output = (folder / "run.out").read_text() if (folder / "run.out").exists() else ""
        states = slurm.call("squeue", "--all") + "\n" + slurm.call("sinfo", "-N", "-l")
        assert time.monotonic() < deadline, f"{what}: it did not come\n{output[-4000:]}\n{states}"
        time.sleep(0.2)


def trained_steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [values for line in lines if line.endswith("\n") and "train/loss" in (values := json.loads(line))]


def trains_on(folder: Path, num_workers: int, after: int = 0) -> Callable[[], bool]:
    def trains() -> bool:
        lines = trained_steps(folder)
        return bool(lines) and lines[-1]["step"] > after and lines[-1]["time/num_workers"] == num_workers

    return trains


def test_a_job_is_preempted_and_loses_a_node_and_the_bits_are_the_same(tmp_path: Path, slurm: Slurm) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *OVERRIDES, f"run.dir={tmp_path / 'whole'}"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    has_wandb = find_spec("wandb") is not None
    job = launch(slurm, tmp_path, "checkpoint.every_steps=10", f"tracking={'wandb' if has_wandb else 'default'}")
    output = tmp_path / "run.out"
    wait_for(slurm, tmp_path, trains_on(tmp_path, 2), "two workers")
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert any(b"--rdzv-endpoint" in command for command in commands)
    assert not any(b"a secret of the user's" in command for command in commands)

    slurm.call("scancel", "--signal=USR1", job)
    wait_for(slurm, tmp_path, lambda: f"requeue     job {job} has saved" in output.read_text(), "preemption")
    stopped = trained_steps(tmp_path)[-1]["step"]
    slurm.start_again(job)
    wait_for(slurm, tmp_path, trains_on(tmp_path, 2, after=stopped), "two workers after the preemption")

    slurm.lose_node("n2")
    wait_for(slurm, tmp_path, lambda: slurm.state(job) == "PENDING", "the loss of a node")
    slurm.start_node("n2")
    wait_for(slurm, tmp_path, lambda: slurm.num_idle() == 2, "the node's return")
    slurm.start_again(job)
    (tmp_path / "fast").touch()
    wait_for(slurm, tmp_path, lambda: slurm.state(job) == "COMPLETED", "the end")
    assert output.read_text().count("resume      step") >= 2
    assert weights_sha256(tmp_path / "run") == weights_sha256(tmp_path / "whole")
    if has_wandb:
        check_tracked_as_one_run(tmp_path / "run")


def check_tracked_as_one_run(folder: Path) -> None:
    """The three starts, of which one was preempted and one killed, are one W&B run.

    Its history has no gap but what W&B itself had not written yet when it was killed with its node.
    """
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    files = [wandb_files.read(path) for path in paths]
    assert len(files) == 3
    [run_id] = {path.parent.name.rpartition("-")[2] for path in paths}
    assert {file["id"] for file in files if "id" in file} == {run_id}
    preempted, killed, last = [[row["step"] for row in file["history"]] for file in files]
    assert files[0]["alerts"][0][0] == "preempted"
    assert preempted == sorted(set(preempted))
    assert not set(preempted) & {*killed, *last}, "what was sent before the preemption is not sent again"
    losses = {row["step"]: row["train/loss"] for file in files for row in file["history"] if "train/loss" in row}
    wanted = {line["step"]: line["train/loss"] for line in trained_steps(folder.parent)}
    assert losses.items() <= wanted.items()
    assert all(max(preempted) < step < min(last) for step in wanted.keys() - losses.keys())


def test_the_script_fixes_the_folder_before_the_job_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", "--nodes", "3", "--workers", "4", "--dry-run", "--", "batch.size=97", "a=b c"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=3\n" in text
    assert "\nWORKERS=4\n" in text
    assert f"\nset -- run.dir={Path.cwd()}/runs/slurm-" in text
    assert text.split("\nset -- ")[1].splitlines()[0].endswith(" batch.size=97 'a=b c'")
    assert text.index("#SBATCH --nodes=3") < text.index("set -uo pipefail")  # sbatch reads no options after a command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "workers=2"], "Give it as --workers 2"),
        (["--", "-m", "seed=1,2"], "a job trains one run"),
        (["--nodes", "0"], "whole number >= 1"),
        (["--workers", "many"], "workers=many"),
        (["--sbatch=--comment=$(id) x"], "without spaces"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", "--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_scontrol_the_job_says_how_to_go_on(tmp_path: Path) -> None:
    """In a container, for example. srun is played by a script here: the workers have saved."""
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 75\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "bash").symlink_to("/bin/bash")
    environment = {"PATH": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "3"}
    command = ["/bin/bash", str(ROOT / "launch/slurm.sbatch"), "steps=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "error: job 6_3 has saved but cannot be queued again: there is no scontrol here" in done.stderr
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "requeue 6_3"
