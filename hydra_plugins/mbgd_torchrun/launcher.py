"""Starts a sweep's jobs on this host from one process, each with its own workers."""

import os
import sys
import time
from collections.abc import Sequence
from signal import Signals

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.mbgd_torchrun.jobs import End, Ended, Job, JobsLauncher, refuse_settings
from hydra_plugins.mbgd_torchrun.processes import Command, run_all
from mbgd.cli import launching
from mbgd.cli.launching import num_cores

SECONDS_TO_SHUT_DOWN = 10
"""How long torchrun waits for workers to save and end."""


class TorchrunLauncher(JobsLauncher):
    """Starts each job in processes of its own, with the command that started this one."""

    def __init__(self, nproc_per_node: int, max_parallel: int, timeout_seconds: float | None) -> None:
        refuse_settings({"nproc_per_node": nproc_per_node, "max_parallel": max_parallel})
        if timeout_seconds is not None and not (isinstance(timeout_seconds, int | float) and timeout_seconds > 0):
            sys.exit(f"error: hydra.launcher.timeout_seconds={timeout_seconds}; it must be > 0, or null for no limit.")
        self.num_workers, self.max_parallel, self.timeout_seconds = nproc_per_node, max_parallel, timeout_seconds

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.gpus = hand_out_gpus(visible_gpus(), self.num_workers, self.max_parallel)

    def describe(self) -> str:
        size = f"of {self.num_workers} worker{'s' if self.num_workers > 1 else ''}"
        return f"{size}, {self.max_parallel} at once" if self.max_parallel > 1 else size

    def run(self, jobs: Sequence[Job], ended: Ended) -> Signals | None:
        def start(index: int, slot: int) -> Command:
            job = jobs[index]
            job.record.write(job.folder)
            with job.log.open("a") as log:
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} job {job.record.number}\n")
            print(f"job {job} · log {job.log}", flush=True)
            return self._command(job, self.gpus[slot])

        return run_all(
            len(jobs),
            start,
            lambda index, exit_code, seconds: ended(index, End(exit_code, f"{seconds:.0f} s")),
            max_parallel=self.max_parallel,
            timeout_seconds=self.timeout_seconds,
        )

    def _command(self, job: Job, gpus: str | None) -> Command:
        threads = max(1, num_cores() // (self.max_parallel * self.num_workers))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        workers = [f"workers={self.num_workers}", f"--shutdown-timeout={SECONDS_TO_SHUT_DOWN}"]
        start = [sys.executable, *launching.program, *(workers if self.num_workers > 1 else [])]
        return Command([*start, *self.arguments(job)], job.log, environment | job.environment())


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
