"""A trace of some steps, one file for each worker, for ui.perfetto.dev or chrome://tracing."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mbgd.config import profiled_steps
from mbgd.errors import UsageError, optional
from mbgd.workers.group import Workers

T = TypeVar("T")

_NOTHING: AbstractContextManager[object] = nullcontext()


def part(name: str) -> AbstractContextManager[object]:
    """Names the work inside in the trace of a running torch profiler; does nothing if none runs."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else _NOTHING


class Profiler(Protocol):
    """Watches a run step by step."""

    def steps(self, shards: Iterable[T], num_steps_done: int) -> Iterable[T]:
        """The shards of the steps after `num_steps_done`; a step lasts until the next shard is asked for."""


class NoProfiler:
    """Watches nothing."""

    def steps(self, shards: Iterable[T], num_steps_done: int) -> Iterable[T]:
        return shards


class TraceOfSteps:
    """Writes a trace of the given steps, counted from 1, as far as they are not done yet.

    One that begins in the middle of them has a file of its own: the steps before are in another.
    """

    def __init__(self, folder: Path, rank: int, steps: range, device: torch.device, *, quiet: bool) -> None:
        self._folder, self._rank, self._steps, self._quiet = folder, rank, steps, quiet
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)

    def steps(self, shards: Iterable[T], num_steps_done: int) -> Iterator[T]:
        rest = iter(shards)
        first, last = max(self._steps[0], num_steps_done + 1), self._steps[-1]
        if first > last and not self._folder.exists():
            self._say(f"none: steps {self._steps[0]} to {last} are done already")
        with ExitStack() as trace:  # a run that ends or fails within these steps writes its trace, too
            for step in count(num_steps_done + 1):
                if step == first <= last:
                    middle = f".from-{first}" if first > self._steps[0] else ""
                    trace.enter_context(self._trace(self._folder / f"worker-{self._rank}{middle}.json.gz"))
                with part(f"step {step}"):
                    with part("data_wait"):
                        shard = next(rest, None)
                    if shard is None:
                        return
                    yield shard
                if step == last:
                    trace.close()

    @contextmanager
    def _trace(self, path: Path) -> Iterator[None]:
        trace = None
        with optional("the profiler could not be started", "Training goes on without a trace."):
            started = profile(activities=self._activities)
            started.start()
            trace = started
        try:
            yield
        finally:
            if trace is not None:
                with optional(f"the trace {path} could not be written", "Training goes on."):
                    self._write(trace, path)

    def _write(self, trace: profile, path: Path) -> None:
        trace.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
        self._say(f"{path}, and one for each other worker; open them at ui.perfetto.dev")

    def _say(self, what: str) -> None:
        if not self._quiet:
            print(f"profile     {what}", flush=True)


def check(asked: str | None, num_steps: int) -> None:
    """UsageError if `profile` names steps beyond the run's last."""
    if asked is not None and profiled_steps(asked)[-1] > num_steps:
        raise UsageError(f"profile={asked}, but the run ends after step {num_steps}. Name steps up to that one.")


def create(asked: str | None, run: Path, workers: Workers, *, quiet: bool) -> Profiler:
    """This worker's profiler; its trace goes into the run's folder. quiet: do not print where."""
    if asked is None:
        return NoProfiler()
    quiet = quiet or not workers.is_main
    return TraceOfSteps(run / "profile", workers.rank, profiled_steps(asked), workers.device, quiet=quiet)
