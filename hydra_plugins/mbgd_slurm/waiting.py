"""Waits for the tasks of job arrays: looks for their files often, and asks SLURM rarely."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from hydra_plugins.mbgd_torchrun.jobs import End, Ended
from mbgd.cli import slurm
from mbgd.errors import FAILED

EXIT_CODE = "job.exit_code"
"""The file in a job's folder that its task writes at its end, unless it is to start again."""

SECONDS_BETWEEN_LOOKS = 1.0
"""Time between looks for these files."""

SECONDS_BETWEEN_QUESTIONS = 5.0
"""Least time between questions to SLURM while a task seems to have failed."""

SECONDS_TO_BE_SURE = 15.0
"""A task that SLURM says has ended is given up after this time: a shared file system may show its file late, and a task
whose node was lost may be queued again."""

SECONDS_TO_SAVE = 60.0
"""How long cancelled tasks are waited for; SLURM kills them after its KillWait, by default 30 s."""


@dataclass(frozen=True)
class Task:
    """A job of a sweep in SLURM's queue."""

    name: str
    """Such as 12_3: array and number."""
    folder: Path

    def exit_code(self) -> int | None:
        """None: it has not ended, or could not say so."""
        try:
            name, code = (self.folder / EXIT_CODE).read_text().split()
        except (OSError, ValueError):
            return None
        return int(code) if name == self.name and code.isdigit() else None


@dataclass
class Queue:
    """What SLURM has said about tasks so far."""

    seconds: float
    """Between two questions, unless a task seems to have failed."""
    asked: float
    """When SLURM was last asked; at first: when the tasks were submitted."""
    ended: dict[str, tuple[float, slurm.State]] = field(default_factory=dict)
    """The tasks that had ended when SLURM was last asked: since when, and how."""
    told: set[str] = field(default_factory=set)

    def ask(self, tasks: Collection[Task], *, soon: bool) -> None:
        """Ask SLURM about these tasks, if it is time."""
        seconds = min(self.seconds, SECONDS_BETWEEN_QUESTIONS) if soon or self.ended else self.seconds
        if not tasks or time.monotonic() < self.asked + seconds:
            return
        self.asked = time.monotonic()
        found = slurm.states(arrays(tasks))
        if found is None:
            self._tell("squeue does not answer; the sweep goes on waiting")
            return
        for task in tasks:
            state = found.get(task.name, slurm.GONE)
            if state.has_ended:
                since, _ = self.ended.get(task.name, (self.asked, state))
                self.ended[task.name] = since, state
            else:
                self.ended.pop(task.name, None)
            if "held" in state.reason.lower():
                self._tell(f"SLURM holds job {task.name} ({state.reason}): scontrol release {task.name}")

    def end(self, task: Task, exit_code: int | None) -> End | None:
        """How the task has failed; None if it has not, as far as known. exit_code: what it wrote itself."""
        since, state = self.ended.get(task.name, (self.asked, slurm.GONE))
        if exit_code and task.name in self.ended and state.name == "FAILED":
            return End(exit_code, f"SLURM job {task.name}")
        if self.asked - since < SECONDS_TO_BE_SURE:
            return None
        how = (slurm.ended_as(task.name) if state is slurm.GONE else "") or state.name
        told = f"ended with {how}" if exit_code is None else f"ended with {how} and exit code {exit_code}"
        return End(exit_code or FAILED, f"SLURM job {task.name}", cause=told)

    def _tell(self, what: str) -> None:
        if what not in self.told:
            self.told.add(what)
            print(f"note: {what}", flush=True)


def wait_for(tasks: Mapping[int, Task], ended: Ended, squeue_seconds: float, received: Sequence[Signals]) -> None:
    """Call `ended` for each task that ends, until all have, or a signal is received: then the rest is cancelled.

    A task tells its success itself, by its file. It has failed only once SLURM says that it has ended: one that fails
    because of its node starts again.
    """
    waiting, queue = dict(tasks), Queue(squeue_seconds, asked=time.monotonic())
    while waiting and not received:
        time.sleep(min(SECONDS_BETWEEN_LOOKS, squeue_seconds))
        codes = {index: task.exit_code() for index, task in waiting.items()}
        for index, code in codes.items():
            task = waiting[index]
            end = End(0, f"SLURM job {task.name}") if code == 0 else queue.end(task, code)
            if end is not None:
                del waiting[index]
                ended(index, end)
        queue.ask(waiting.values(), soon=any(codes.values()))
    if waiting:
        print(f"{received[0].name}: {len(waiting)} jobs may save their state, then end", flush=True)
        cancel(waiting.values())


def cancel(tasks: Collection[Task]) -> None:
    """Cancel these tasks, and wait until they have ended."""
    slurm.cancel([f"{array}_[{','.join(numbers_in(array, tasks))}]" for array in arrays(tasks)])
    deadline = time.monotonic() + SECONDS_TO_SAVE
    while time.monotonic() < deadline:
        found = slurm.states(arrays(tasks))
        if found is not None and all(found.get(task.name, slurm.GONE).has_ended for task in tasks):
            return
        time.sleep(2 * SECONDS_BETWEEN_LOOKS)
    print(f"note: after {SECONDS_TO_SAVE:.0f} s, not all cancelled jobs have ended: squeue --me", flush=True)


def arrays(tasks: Collection[Task]) -> list[str]:
    """The numbers of the tasks' arrays."""
    return sorted({task.name.split("_")[0] for task in tasks})


def numbers_in(array: str, tasks: Collection[Task]) -> list[str]:
    """The numbers of the array's tasks."""
    return [task.name.split("_")[1] for task in tasks if task.name.startswith(f"{array}_")]
