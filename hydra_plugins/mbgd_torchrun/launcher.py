"""Starts a sweep's jobs from one process, each with its own workers, and gives the sweeper their results."""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.mbgd_torchrun.processes import Command, run_all
from mbgd.building import configuration
from mbgd.cli import launching
from mbgd.cli.launching import num_cores, quoted
from mbgd.errors import FAILED, UsageError
from mbgd.files.job_file import JobRecord
from mbgd.runs import sweeps

SECONDS_TO_SHUT_DOWN = 10
"""How long torchrun waits for workers to save and end."""

LINES_SHOWN = 15
"""Lines shown from the end of a failed job's log."""

OF_THE_SWEEP = re.compile(r"[+~]*hydra[./](launcher|sweeper|sweep|mode)\b")
"""Hydra's overrides that are for the sweep, not for its jobs."""


class JobFailed(CompactHydraException):
    """The job has no value for the sweeper."""

    exit_code = FAILED


@dataclass(frozen=True)
class Job:
    """A job to run."""

    record: JobRecord
    config: DictConfig
    folder: Path

    def __str__(self) -> str:
        swept = " ".join(f"{key}={value}" for key, value in self.record.swept.items())
        return f"{self.record.number} · {swept}" if swept else str(self.record.number)


class TorchrunLauncher(Launcher):
    """Starts each job in processes of its own, with the command that started this one."""

    def __init__(self, nproc_per_node: int, max_parallel: int, timeout_seconds: float | None) -> None:
        for name, value in (("nproc_per_node", nproc_per_node), ("max_parallel", max_parallel)):
            if not isinstance(value, int) or value < 1:
                sys.exit(f"error: hydra.launcher.{name}={value}; it must be a whole number ≥ 1.")
        if timeout_seconds is not None and not (isinstance(timeout_seconds, int | float) and timeout_seconds > 0):
            sys.exit(f"error: hydra.launcher.timeout_seconds={timeout_seconds}; it must be > 0, or null for no limit.")
        self.num_workers, self.max_parallel, self.timeout_seconds = nproc_per_node, max_parallel, timeout_seconds

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        for note in configuration.which_wins(config.hydra):
            print(f"note: {note}", flush=True)
        self.folder = Path(str(config.hydra.sweep.dir))
        self.gpus = hand_out_gpus(visible_gpus(), self.num_workers, self.max_parallel)
        wanted = OmegaConf.select(config, "hydra.sweeper.direction")
        if wanted is not None and getattr(wanted, "name", wanted) != config.sweep.direction:
            sys.exit(
                f"error: hydra.sweeper.direction={getattr(wanted, 'name', wanted)}, but sweep.direction="
                f"{config.sweep.direction}; give both the same."
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; returns each job's `sweep.metric`, or a JobFailed that says why it has none."""
        jobs = [self._job(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        for job in jobs:
            refuse_folders(job.record.overrides)
            refuse_another_sweeps(job)
        if initial_job_idx == 0:
            self._announce(len(jobs))
        results: dict[int, JobReturn] = {}

        def start(index: int, slot: int) -> Command:
            job = jobs[index]
            job.record.write(job.folder)
            print(f"job {job} · log {job.folder / sweeps.LOG}", flush=True)
            return self._command(job, self.gpus[slot])

        def ended(index: int, exit_code: int, seconds: float) -> None:
            job = jobs[index]
            dataclasses.replace(job.record, exit_code=exit_code).write(job.folder)
            results[index], text = self._result(job, exit_code)
            print(f"job {job} · {text} · {seconds:.0f} s", flush=True)
            if exit_code:
                print(end_of(job.folder / sweeps.LOG), flush=True)

        stopped = run_all(len(jobs), start, ended, max_parallel=self.max_parallel, timeout_seconds=self.timeout_seconds)
        if stopped:
            sweeps.to_show.clear()
            print(f"stopped by {stopped.name}; `python -m mbgd sweep {self.folder}` shows what there is", flush=True)
            if self.config.hydra.sweeper._target_.endswith(".BasicSweeper"):  # others try other values next time
                print(f"the same command with hydra.sweep.dir={self.folder} goes on", flush=True)
            sys.exit(128 + stopped)
        sweeps.to_show[:] = [self.folder]
        return [results[index] for index in range(len(jobs))]

    def _job(self, number: int, overrides: Sequence[str]) -> Job:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        # By key: sweepers write values in their own way, such as True for true.
        given = OverridesParser.create().parse_overrides(list(self.config.hydra.overrides.task))
        constant = {one.key_or_group for one in given if not one.is_sweep_override()}
        values = dict(one.lstrip("+").split("=", 1) for one in overrides if one[0] != "~")
        swept = {key: value for key, value in values.items() if key not in constant}
        record = JobRecord(number, swept, list(overrides))
        return Job(record, config, self.folder / str(config.hydra.sweep.subdir))

    def _command(self, job: Job, gpus: str | None) -> Command:
        threads = max(1, num_cores() // (self.max_parallel * self.num_workers))
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "MBGD_SWEEP": job.folder.parent.name,  # trackers group the jobs by it
            **os.environ,
            "PYTHONUNBUFFERED": "1",
        }
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        environment |= {key: str(value) for key, value in job.config.hydra.job.env_set.items()}
        workers = [f"workers={self.num_workers}", f"--shutdown-timeout={SECONDS_TO_SHUT_DOWN}"]
        hydra = self.config.hydra
        options = ["--config-name", hydra.job.config_name]
        for source in hydra.runtime.config_sources:
            if source.provider == "command-line":
                options += ["--config-dir", source.path]
        own = [one for one in hydra.overrides.hydra if not OF_THE_SWEEP.match(one)]
        start = [sys.executable, *launching.program, *(workers if self.num_workers > 1 else [])]
        folder = f"run.dir={quoted(str(job.folder))}"
        return Command([*start, *options, *job.record.overrides, *own, folder], job.folder / sweeps.LOG, environment)

    def _result(self, job: Job, exit_code: int) -> tuple[JobReturn, str]:
        """The result of a job that has ended, for the sweeper and in words."""
        parts = [str(key) for key in job.config if key != "hydra"]
        result = JobReturn(
            overrides=job.record.overrides,
            cfg=OmegaConf.masked_copy(job.config, parts),
            hydra_cfg=OmegaConf.masked_copy(job.config, "hydra"),
            working_dir=str(job.folder),
        )
        metric = self.config.sweep.metric
        try:
            if exit_code:
                raise UsageError(f"failed with exit code {exit_code}")
            value = sweeps.metric_value(job.folder, metric)
        except UsageError as error:
            result.status, result.return_value = JobStatus.FAILED, JobFailed(f"{job.folder}: {error}")
            return result, str(error)
        result.status, result.return_value = JobStatus.COMPLETED, value
        return result, f"{metric} {value:.4g}"

    def _announce(self, num_jobs: int) -> None:
        size = f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''}"
        jobs = f"{num_jobs} job{'s' if num_jobs > 1 else ''} of {size}"
        together = f", {self.max_parallel} at once" if self.max_parallel > 1 else ""
        print(f"sweep {self.folder} · {jobs}{together}", flush=True)


def refuse_folders(overrides: Sequence[str]) -> None:
    for one in overrides:
        if one.lstrip("+").startswith(("run.dir=", "run.id=")):
            sys.exit(
                f"error: {one} in a sweep would give every job the same folder. Set hydra.sweep.dir, the folder that "
                "holds one for each job."
            )


def refuse_another_sweeps(job: Job) -> None:
    """Exit if a job's folder holds anything but the same job, which would go on there."""
    try:
        before = JobRecord.read(job.folder)
    except UsageError as error:
        sys.exit(f"error: {error}")
    is_other = before is not None and before.overrides != job.record.overrides
    if is_other or (before is None and (job.folder / "config.yaml").exists()):
        what = f"the job {' '.join(before.overrides)}" if before is not None else "a run that no sweep has started"
        sys.exit(
            f"error: {job.folder} holds {what}, not {' '.join(job.record.overrides)}. Give another hydra.sweep.dir, or "
            "none for a new folder."
        )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [one.strip() for one in given.split(",") if one.strip()]
    import torch  # slow to import, and this module is imported at each start

    return [str(number) for number in range(torch.cuda.device_count())]


def hand_out_gpus(gpus: Sequence[str], num_workers: int, max_parallel: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each job that runs at once; None: unchanged, as there is no GPU for each worker."""
    if len(gpus) < num_workers:
        return [None] * max_parallel
    if len(gpus) < num_workers * max_parallel:
        sys.exit(
            f"error: hydra.launcher.max_parallel={max_parallel} jobs of {num_workers} workers need "
            f"{num_workers * max_parallel} GPUs; there are {len(gpus)}. Use max_parallel={len(gpus) // num_workers}, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES= python train.py …) to train on the CPU."
        )
    return [",".join(gpus[slot * num_workers : (slot + 1) * num_workers]) for slot in range(max_parallel)]


def end_of(log: Path) -> str:
    """The last lines of a job's log."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LINES_SHOWN:])
