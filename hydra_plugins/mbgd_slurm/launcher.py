"""Submits a sweep's jobs as one SLURM job array, waits for them, and gives the sweeper their results."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import Signals

from hydra_plugins.mbgd_slurm.waiting import EXIT_CODE, Task, wait_for
from hydra_plugins.mbgd_torchrun.jobs import End, Ended, Job, JobsLauncher, refuse_settings
from hydra_plugins.mbgd_torchrun.processes import signals
from mbgd.cli import launching, slurm
from mbgd.errors import UsageError
from mbgd.files.atomic import write_atomically
from mbgd.files.job_file import JobRecord
from mbgd.runs import sweeps


class SlurmLauncher(JobsLauncher):
    """Jobs that are complete are not submitted again; those that are still in the queue are waited for."""

    def __init__(
        self,
        nodes: int,
        nproc_per_node: int | str,
        max_parallel: int | None,
        time: str | int | None,
        sbatch: Sequence[str],
        squeue_seconds: float,
    ) -> None:
        refuse_settings({"nodes": nodes})
        try:
            launching.check(str(nproc_per_node))
        except UsageError as error:
            sys.exit(f"error: {error}")
        if max_parallel is not None:
            refuse_settings({"max_parallel": max_parallel})
        if not (isinstance(squeue_seconds, int | float) and squeue_seconds > 0):
            sys.exit(f"error: hydra.launcher.squeue_seconds={squeue_seconds}; it must be a number > 0.")
        self.nodes, self.workers, self.max_parallel = nodes, str(nproc_per_node), max_parallel
        self.options = [*([] if time is None else [f"--time={time}"]), *(str(one) for one in sbatch)]
        self.squeue_seconds = squeue_seconds

    def describe(self) -> str:
        nodes = f"{self.nodes} node{'s' if self.nodes > 1 else ''}"
        return f"of {nodes} with workers={self.workers}, on SLURM"

    def run(self, jobs: Sequence[Job], ended: Ended) -> Signals | None:
        tasks, waiting = self._in_the_queue(jobs), []
        for index, job in enumerate(jobs):
            if index in tasks:
                print(f"job {job} · is SLURM's job {tasks[index].name} already · log {job.log}", flush=True)
            elif is_complete(job):
                ended(index, End(0, "complete before"))
            else:
                waiting.append(index)
        with signals() as received:
            try:
                tasks |= self._submit(jobs, waiting)
            except UsageError as error:
                sys.exit(f"error: {error}")
            wait_for(tasks, ended, self.squeue_seconds, received)
        return received[0] if received else None

    def _in_the_queue(self, jobs: Sequence[Job]) -> dict[int, Task]:
        """Tasks of an earlier array for these jobs, by the job's index: the sweep's process ended before them."""
        records = {index: JobRecord.read(job.folder) for index, job in enumerate(jobs)}
        names = {index: one.slurm_job for index, one in records.items() if one is not None and one.slurm_job}
        known = slurm.states(sorted({name.split("_")[0] for name in names.values()})) if names else {}
        if known is None:
            sys.exit("error: squeue does not answer, so it is unknown whether jobs of this sweep still run. Try later.")
        return {
            index: Task(name, jobs[index].folder)
            for index, name in names.items()
            if name in known and not known[name].has_ended and known[name].name != "COMPLETING"
        }

    def _submit(self, jobs: Sequence[Job], indices: Sequence[int]) -> dict[int, Task]:
        """Submit these jobs as one array; its tasks, by the job's index."""
        if not indices:
            return {}
        for index in indices:
            jobs[index].record.write(jobs[index].folder)
            (jobs[index].folder / EXIT_CODE).unlink(missing_ok=True)
        path = self.folder.absolute() / f"array-{jobs[indices[0]].record.number}.sbatch"
        write_atomically(path, self.script([jobs[index] for index in indices], path).encode())
        try:
            array = slurm.submit(path)
        except UsageError as error:
            if "array specification" not in str(error):
                raise
            raise UsageError(
                f"{error}\nAn array has at most MaxArraySize jobs (scontrol show config). If there are more, set "
                "hydra.sweeper.max_batch_size: the sweep submits one array after the other."
            ) from error
        print(f"submitted   job array {array} · script {path} · stop it with Ctrl-C, or scancel {array}", flush=True)
        tasks = {}
        for number, index in enumerate(indices):
            job = jobs[index]
            tasks[index] = Task(f"{array}_{number}", job.folder)
            dataclasses.replace(job.record, slurm_job=tasks[index].name).write(job.folder)
            print(f"job {job} · log {job.log}", flush=True)
        return tasks

    def script(self, jobs: Sequence[Job], path: Path) -> str:
        """The array's script: each task trains the job of its number in this list."""
        throttle = "" if self.max_parallel is None else f"%{self.max_parallel}"
        options = [f"--array=0-{len(jobs) - 1}{throttle}", f"--nodes={self.nodes}", f"--job-name={self.folder.name}"]
        options += [f"--output={path.with_suffix('.out')}", f"--chdir={Path.cwd()}", *self.options]
        settings = ['case "$SLURM_ARRAY_TASK_ID" in', *map(self._case, range(len(jobs)), jobs), "esac"]
        return slurm.script(options, workers=self.workers, program=launching.program, settings=settings)

    def _case(self, number: int, job: Job) -> str:
        folder = job.folder.absolute()
        exports = shlex.join(f"{key}={value}" for key, value in job.environment().items())
        return (
            f"{number})\n    export {exports}\n"
            f"    LOG={shlex.quote(str(folder / sweeps.LOG))} EXIT_CODE={shlex.quote(str(folder / EXIT_CODE))}\n"
            f"    set -- {shlex.join(self.arguments(job))} ;;"
        )


def is_complete(job: Job) -> bool:
    """Whether the job has ended without an error, perhaps while no process waited for it."""
    found = sweeps.read_job(job.folder)
    if found is None or not found.summary or found.problem:
        return False
    return 0 in (found.record.exit_code, Task(found.record.slurm_job, job.folder).exit_code())
