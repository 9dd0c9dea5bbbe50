"""`workers=N` and the other arguments for the launcher: how many processes train, and how they are started."""

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mbgd.errors import UsageError
from mbgd.workers.place import place

PER_HOST_WITHOUT_GPU = 2
"""Number of workers for workers=auto on a host without a GPU."""

OPTIONS = ("--nnodes", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--local-addr", "--shutdown-timeout")
"""torchrun's options, beside --max-restarts."""

COMMAND = "MBGD_COMMAND"
"""Environment variable with the command as the user gave it, for the workers' messages."""

program: list[str] = []
"""Python's arguments that run this program, without the program's own: workers and jobs of a sweep start with them."""


@dataclass(frozen=True)
class Wanted:
    """The arguments for the launcher."""

    workers: str | None
    max_restarts: int
    options: tuple[str, ...]
    """torchrun's options with their values."""

    @property
    def starts_processes(self) -> bool:
        return self.workers not in (None, "1") or self.max_restarts > 0 or bool(self.options)


def split(arguments: Sequence[str]) -> tuple[Wanted, list[str]]:
    """(arguments for the launcher, arguments for Hydra); UsageError for mistakes in the former."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in OPTIONS:
        parser.add_argument(option)
    parser.add_argument("--max-restarts", default="0")

    def refuse(message: str) -> None:
        raise UsageError(f"{message}. `mbgd {command()} --help` shows what there is.")

    parser.error = refuse  # type: ignore[assignment, method-assign]
    given, rest = parser.parse_known_args(arguments)
    workers = None
    overrides = []
    for one in rest:
        key, equals, value = one.partition("=")
        if key == "workers" and equals:
            if workers is not None:
                raise UsageError(f"workers= is given twice, as {workers} and {value}. Give it once.")
            workers = value
            check(value)
        else:
            overrides.append(one)
    if not re.fullmatch(r"\d{1,6}", given.max_restarts):
        raise UsageError(f"--max-restarts {given.max_restarts}; it must be a whole number >= 0.")
    values = {option: getattr(given, option.strip("-").replace("-", "_")) for option in OPTIONS}
    options = tuple(f"{option}={value}" for option, value in values.items() if value is not None)
    return Wanted(workers, int(given.max_restarts), options), overrides


def check(workers: str) -> None:
    """UsageError unless `workers` is a number ≥ 1, gpus or auto."""
    if workers not in ("auto", "gpus") and not re.fullmatch(r"[1-9]\d{0,5}", workers):
        raise UsageError(
            f"workers={workers}; it must be a whole number >= 1 (how many processes train on this host), gpus (one for "
            f"each GPU), or auto (gpus; {PER_HOST_WITHOUT_GPU} where there is none)."
        )


def num_workers(workers: str | None, overrides: Sequence[str]) -> int:
    """Number of workers on this host; UsageError if there are fewer GPUs."""
    import torch  # slow to import

    num_gpus = torch.cuda.device_count()
    if workers in (None, "auto"):
        return num_gpus or PER_HOST_WITHOUT_GPU
    if workers == "gpus":
        if num_gpus == 0:
            raise UsageError(
                "workers=gpus, but torch sees no GPU on this host. Use workers=N for N processes on the CPU."
            )
        return num_gpus
    number = int(workers)
    if 0 < num_gpus < number and "backend=gloo" not in overrides:
        raise UsageError(
            f"workers={number}, but this host has {num_gpus} GPU{'s' if num_gpus > 1 else ''}; each worker needs one "
            f"of its own. Use workers={num_gpus}, or backend=gloo to train on the CPU."
        )
    return number


def launch(wanted: Wanted, overrides: Sequence[str]) -> int:
    """Start the workers, each with these overrides, and wait for their end; the exit code for the shell."""
    number = num_workers(wanted.workers, overrides)
    from mbgd.cli import agent
    from mbgd.torchrun import prepare

    share_threads(number)
    os.environ[COMMAND] = as_given(wanted, overrides)
    rendezvous = ["--rdzv-backend=c10d"] if any(one.startswith("--nnodes") for one in wanted.options) else []
    options = [*wanted.options, *rendezvous, f"--nproc-per-node={number}", f"--max-restarts={wanted.max_restarts}"]
    worker = [sys.executable, "-u", *program, *overrides]
    # torchrun replaces ${…} by values and $$ by $.
    return agent.run(prepare([*options, "--no-python", *(one.replace("$", "$$") for one in worker)]))


def share_threads(number: int) -> None:
    """Divide the cores evenly among the workers of this host, unless OMP_NUM_THREADS is set."""
    from mbgd.task.threads import SHARED_OUT  # torch is slow to import

    if "OMP_NUM_THREADS" not in os.environ:
        os.environ[SHARED_OUT] = "1"
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_cores() // number))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_given(wanted: Wanted, overrides: Sequence[str]) -> str:
    """The command, ready to paste into a shell."""
    is_script = bool(program) and program[0].endswith(".py")
    start = ["python", *program] if is_script else ["mbgd", command()]
    workers = [f"workers={wanted.workers}"] if wanted.workers else []
    restarts = [f"--max-restarts={wanted.max_restarts}"] if wanted.max_restarts else []
    return shlex.join([*start, *workers, *restarts, *wanted.options, *overrides])


def command() -> str:
    """The command of mbgd that this program runs: train, evaluate or predict."""
    return program[-1] if program and not program[-1].endswith(".py") else "train"


def end_silently_at_interrupt() -> None:
    """Until training sets its own handler, let Ctrl-C end a worker without a traceback."""
    if started_by_launcher() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def started_by_launcher() -> bool:
    """Whether this process is a worker started by torchrun, SLURM or this program."""
    return "RANK" in os.environ


def check_started(wanted: Wanted) -> None:
    """UsageError if a worker's place is contradictory, or its command asks for another number of workers."""
    place()
    size = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if wanted.workers not in (None, size):
        raise UsageError(
            f"workers={wanted.workers} on a worker of {size} that another launcher has started. Leave workers= out, or "
            f"start one process: mbgd {command()} workers=…"
        )


def with_folder(command: str, folder: str) -> str:
    """The command without resume=never, and with the run's folder added if it names none."""
    words = [one for one in shlex.split(command) if one not in ("resume=never", "resume.from=never")]
    if not any(one.startswith(("run.dir=", "run.id=")) for one in words):
        words.append(f"run.dir={folder if re.fullmatch(r'[A-Za-z0-9_./-]+', folder) else quoted(folder)}")
    return shlex.join(words)


def quoted(value: str) -> str:
    """A text quoted for Hydra's command line: only backslashes before a quotation mark are doubled."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"
