"""Sweeps as job arrays, on a real SLURM of two nodes; skipped where SLURM is not installed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.mbgd_slurm.launcher import is_complete
from hydra_plugins.mbgd_slurm.waiting import EXIT_CODE, SECONDS_TO_BE_SURE, Queue, Task
from hydra_plugins.mbgd_torchrun.jobs import End, Job, first_error
from mbgd.cli.slurm import GONE, State, without_a_job
from mbgd.files.job_file import JobRecord
from mbgd.runs.sweeps import read_jobs

from hosts import ROOT, SLOW_LOADING, weights_sha256
from slurm import Slurm, cluster

OVERRIDES = ["averaging=reproducible", "batch.drop_last=true", "model.dropout=0.2", "steps=200", "log_every_steps=5"]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with cluster(tmp_path / "slurm") as started:
        yield started


class Sweep:
    """A sweep whose jobs load slowly until the file `fast` is there."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.folder, self._slurm, self.output = folder, slurm, folder / "sweep.out"
        (folder / "slow.py").write_text(SLOW_LOADING)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        data = ["data.train._target_=slow.Slow", "~data.train.split", "+data.train.seconds=0.1"]
        data += [f"+data.train.fast={self.folder / 'fast'}", "hydra.launcher.squeue_seconds=1", "hydra.sweep.dir=made"]
        command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=slurm", *OVERRIDES, *data, *overrides]
        environment = self._slurm.environment | {"PYTHONPATH": f"{ROOT}:{self.folder}", "OMP_NUM_THREADS": "1"}
        with self.output.open("ab") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def told(self) -> str:
        return self.output.read_text()

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 150
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("made/*/job.log")]
                pytest.fail(f"{what}: it did not come\n{self.told()}\n{self._slurm.call('squeue')}\n{logs}")
            time.sleep(0.2)

    def array(self) -> str:
        """The number of the array submitted last."""
        return re.findall(r"submitted   job array (\d+)", self.told())[-1]

    def steps(self, job: int) -> int:
        """The last logged step of this job; 0 if there is none."""
        path = self.folder / f"made/{job}/metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.fixture
def sweep(slurm: Slurm, tmp_path: Path) -> Iterator[Sweep]:
    made = Sweep(slurm, tmp_path)
    yield made
    for process in made.processes:
        process.kill()


def test_an_array_comes_back_whatever_happens_to_its_jobs(tmp_path: Path, slurm: Slurm, sweep: Sweep) -> None:
    """Job 0 is preempted and resumes; 1 is undisturbed; 2 has a mistake; 3 is cancelled."""
    undisturbed = [sys.executable, str(ROOT / "train.py"), *OVERRIDES, "batch.size=97", f"run.dir={tmp_path / 'whole'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(undisturbed, check=True, stdout=subprocess.DEVNULL, env=environment)
    process = sweep.start("batch.size=97,64,2000,32", "hydra.launcher.max_parallel=4")
    sweep.wait_for(lambda: all(sweep.steps(job) for job in (0, 1, 3)), "three jobs that train")
    array = sweep.array()
    assert "ArrayTaskThrottle=4" in slurm.call("scontrol", "show", "job", array)
    slurm.call("scancel", f"{array}_3")
    slurm.call("scancel", "--signal=USR1", f"{array}_0")
    log = tmp_path / "made/0/job.log"
    sweep.wait_for(lambda: f"requeue     job {array}_0 has saved" in log.read_text(), "preemption")
    stopped = sweep.steps(0)
    (tmp_path / "fast").touch()
    slurm.start_again(f"{array}_0")
    assert process.wait(timeout=120) == 1
    told = sweep.told()
    assert "4 jobs of 1 node with workers=1, on SLURM" in told
    assert told.count("submitted   job array") == 1

    by_number = {job.record.number: job for job in read_jobs(tmp_path / "made")}
    for number, size in ((0, 97), (1, 64)):
        assert f"job {number} · batch.size={size} · eval/loss {by_number[number].metrics['eval/loss']:.4g}" in told
    [resumed] = re.findall(r"^resume      step (\d+)", log.read_text(), re.MULTILINE)
    assert stopped <= int(resumed) < 200
    assert weights_sha256(tmp_path / "made/0") == weights_sha256(tmp_path / "whole")
    failed = f"job 2 · batch.size=2000 · failed with exit code 2 · SLURM job {array}_2\n    log made/2/job.log\n"
    assert failed + "    error: batch.drop_last=true with batch.size=2000 leaves none" in told
    assert f"job 3 · batch.size=32 · ended with CANCELLED · SLURM job {array}_3" in told
    assert [job.record.exit_code for job in by_number.values()] == [0, 0, 2, 1]


def test_a_sweep_goes_on_after_its_process_died_and_ctrl_c_cancels_its_own_array_alone(
    tmp_path: Path, slurm: Slurm, sweep: Sweep
) -> None:
    other = slurm.call("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600")
    process = sweep.start("batch.size=97,64")
    sweep.wait_for(lambda: sweep.steps(0) and sweep.steps(1), "two jobs that train")
    process.kill()
    array = sweep.array()
    process = sweep.start("batch.size=97,64")
    sweep.wait_for(lambda: f"job 1 · batch.size=64 · is SLURM's job {array}_1 already" in sweep.told(), "the same jobs")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) == 130
    assert "hydra.sweep.dir=made goes on" in sweep.told()
    assert [slurm.state(f"{array}_{number}") for number in (0, 1)] == ["CANCELLED", "CANCELLED"]
    assert slurm.state(other) == "RUNNING"
    assert all(list((tmp_path / f"made/{job}/checkpoints").glob("step-*")) for job in (0, 1))

    (tmp_path / "fast").touch()
    assert sweep.start("batch.size=97,64").wait(timeout=120) == 0, sweep.told()
    assert sweep.array() != array
    assert all("resume      step" in (tmp_path / f"made/{job}/job.log").read_text() for job in (0, 1))
    num_arrays = sweep.told().count("submitted")
    assert sweep.start("batch.size=97,64").wait(timeout=60) == 0
    assert sweep.told().count("complete before") == 2
    assert sweep.told().count("submitted") == num_arrays


def test_an_optimising_sweeper_gets_the_jobs_values(tmp_path: Path, slurm: Slurm, sweep: Sweep) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra 'optuna' is not installed")
    (tmp_path / "fast").touch()
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1",
        "+hydra.job.env_set.A='b c'",
    ]
    process = sweep.start(*search, "hydra.sweeper.sampler.seed=1", "optimizer.lr=interval(0.001,0.1)")
    assert process.wait(timeout=150) == 0, sweep.told()
    best = min(read_jobs(tmp_path / "made"), key=lambda job: job.metrics["eval/loss"])
    found = (tmp_path / "made/optimization_results.yaml").read_text()
    assert f"best_value: {best.metrics['eval/loss']}" in found
    assert "export MBGD_SWEEP=made PYTHONUNBUFFERED=1 'A=b c'\n" in (tmp_path / "made/array-1.sbatch").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["workers=many"], "workers=many; it must be a whole number"),
        (["hydra.launcher.nodes=0"], "hydra.launcher.nodes=0; it must be a whole number"),
        (["hydra.launcher.squeue_seconds=0"], "squeue_seconds=0; it must be a number > 0"),
        (["hydra.launcher.sbatch=['--comment=$(id) x']"], "without spaces and quotes"),
        ([], "sbatch is not installed here. Where it is: sbatch "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_any_job_is_submitted(tmp_path: Path, overrides: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=slurm", "seed=0,1", *overrides]
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert message in done.stderr
    assert "MaxArraySize" not in done.stderr


def test_the_script_has_options_then_settings_and_the_nodes_count_their_gpus(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=slurm", "seed=0,1", "workers=auto"]
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)}
    limits = ["hydra.launcher.nodes=3", "hydra.launcher.max_parallel=1", "hydra.launcher.sbatch=['--qos=low']"]
    made = [*limits, "hydra.launcher.time=4:00:00", "hydra.sweep.dir=made"]
    done = subprocess.run([*command, *made], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "sbatch is not installed here" in done.stderr
    text = (tmp_path / "made/array-0.sbatch").read_text()
    options, settings = text.split("\nWORKERS=auto\n")  # sbatch reads no options after the first command
    for one in ("--array=0-1%1", "--nodes=3", "--time=4:00:00", "--qos=low", f"--output={tmp_path}/made/array-0.out"):
        assert f"#SBATCH {one}" in options.splitlines()
    assert "#SBATCH" not in settings
    [first, second] = re.findall(r"^    set -- (.*) ;;$", settings, re.MULTILINE)
    assert " seed=0 " in first
    assert " seed=1 " in second
    assert "workers=" not in first


def test_a_task_has_failed_only_once_slurm_says_so_for_a_while(tmp_path: Path) -> None:
    task, queue = Task("12_3", tmp_path), Queue(30.0, asked=100.0)
    (tmp_path / EXIT_CODE).write_text("11_3 1\n")
    assert task.exit_code() is None, "of an earlier array"
    (tmp_path / EXIT_CODE).write_text("12_3 1\n")
    assert task.exit_code() == 1
    assert queue.end(task, 1) is None, "SLURM has not said that it has ended"
    queue.ended["12_3"] = 100.0, State("NODE_FAIL", "None")
    assert queue.end(task, 1) is None, "it may be queued again"
    queue.ended["12_3"] = 100.0, State("FAILED", "NonZeroExitCode")
    assert queue.end(task, 1) == End(1, "SLURM job 12_3")
    queue.asked += SECONDS_TO_BE_SURE
    queue.ended["12_3"] = 100.0, State("TIMEOUT", "None")
    assert queue.end(task, None) == End(1, "SLURM job 12_3", cause="ended with TIMEOUT")
    assert GONE.has_ended
    assert not State("COMPLETING", "None").has_ended


def test_a_job_that_ended_while_no_process_waited_for_it_is_complete(tmp_path: Path) -> None:
    job = Job(JobRecord(0, {}, ["seed=1"], slurm_job="12_0"), None, tmp_path)  # type: ignore[arg-type]
    job.record.write(tmp_path)
    (tmp_path / EXIT_CODE).write_text("12_0 0\n")
    assert not is_complete(job), "there is no result"
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": {}, "steps": 1}))
    assert is_complete(job)
    (tmp_path / EXIT_CODE).write_text("12_0 1\n")
    assert not is_complete(job)


def test_the_first_error_of_the_last_start_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text(
        "--- 2026-01-02 03:04:05 job 12_3 on n1\nerror on worker 1: lost\n"
        "--- 2026-01-02 03:09:05 job 12_3 on n1\nTraceback (most recent call last):\n  the first\nKeyError: 'a'\n"
        "error: of the consequence\n"
    )
    assert first_error(log).splitlines()[:2] == ["    Traceback (most recent call last):", "      the first"]
    log.write_text("\n".join(f"line {number}" for number in range(40)))
    assert first_error(log).splitlines()[-1] == "    line 39"
    assert "cannot be read" in first_error(tmp_path / "none")


def test_a_job_submitted_from_within_a_job_does_not_inherit_its_size() -> None:
    inherited = {"SLURM_NNODES": "7", "SLURM_CONF": "/etc/slurm.conf", "WANDB_API_KEY": "k"}
    assert without_a_job(inherited) == {"SLURM_CONF": "/etc/slurm.conf", "WANDB_API_KEY": "k"}
