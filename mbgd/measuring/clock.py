"""How long training and each part of a step take, measured without waiting for the device."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

PARTS = ("data_wait", "forward_backward", "averaging", "optimizer")
"""Parts of a step. Time between two steps is REST."""
REST = "rest"
FORWARD = "forward"
"""The part of forward_backward before a step's last backward, in which DDP already waits for other workers."""

MOST_EVENTS = 1024
"""Beyond 2,048 kept events the oldest 1,024 are added up, if the device has completed them."""


class Stopwatch(Protocol):
    """Adds up the time between laps, by part."""

    def lap(self, part: str) -> None:
        """Add the time since the last lap to this part."""

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the last call; this waits for the device."""


class HostStopwatch:
    """For work that the host does itself."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


class StreamStopwatch:
    """For work that the host queues on a CUDA stream, timed by events in the stream itself.

    A part's time is the stream's: if the host runs ahead, waiting for data or other workers counts only while the
    device is idle.
    """

    def __init__(self) -> None:
        self._laps: list[tuple[str, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.lap(REST)

    def lap(self, part: str) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._laps.append((part, event))
        if len(self._laps) > 2 * MOST_EVENTS:
            _, oldest_kept = self._laps[MOST_EVENTS - 1]
            if oldest_kept.query():  # type: ignore[no-untyped-call]  # otherwise keep them: this never waits
                self._add_up(MOST_EVENTS)

    def seconds(self) -> dict[str, float]:
        self._add_up(len(self._laps))
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds

    def _add_up(self, num_laps: int) -> None:
        """Add the oldest `num_laps` laps to the sums. The last of their events is kept: the next lap begins there."""
        laps = self._laps[:num_laps]
        laps[-1][1].synchronize()
        for (_, begin), (part, end) in pairwise(laps):
            self._seconds[part] += begin.elapsed_time(end) / 1000
        self._free += [event for _, event in laps[:-1]]
        del self._laps[: num_laps - 1]


class Clock:
    """Measures the speed of training, without evaluations, and the time of each part of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stopwatch: Stopwatch = StreamStopwatch() if device.type == "cuda" else HostStopwatch()
        self.lap = self._stopwatch.lap  # called several times a step
        self.own_seconds = 0.0
        """Of a step, before the last reading: until its last backward this worker waits for no other."""
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._stopwatch.seconds()
        self._paused = 0.0
        self._started = self._last_read = self._now()

    def laps(self, shards: Iterable[T]) -> Iterator[T]:
        """Yields from `shards`. Getting the next shard counts as data_wait; `lap` measures the rest of the step."""
        self.lap(REST)
        for shard in shards:
            self.lap("data_wait")
            yield shard
            self.lap(REST)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training; a GPU first finishes the work queued before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def read(self, *, num_steps: int, num_examples: int, num_tokens: int | None) -> dict[str, float]:
        """Speeds and times for the log, given the steps, examples and tokens (losses per token) since the last reading.

        Speeds are of all workers together; seconds are per step on this worker. Waits for the device.
        """
        parts = self._stopwatch.seconds()
        self.own_seconds = (parts.get("data_wait", 0.0) + parts.get(FORWARD, 0.0)) / num_steps
        parts["forward_backward"] = parts.get("forward_backward", 0.0) + parts.pop(FORWARD, 0.0)
        now = self._now()
        elapsed, self._last_read = now - self._last_read, now
        speeds = {"examples_per_second": num_examples / elapsed}
        if num_tokens is not None:
            speeds["tokens_per_second"] = num_tokens / elapsed
        seconds = {f"{part}_seconds": parts.get(part, 0.0) / num_steps for part in PARTS}
        return {**speeds, **seconds, "peak_memory_bytes": peak_memory_bytes(self._device)}

    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._now() - self._started

    def _now(self) -> float:
        return time.perf_counter() - self._paused


def peak_memory_bytes(device: torch.device) -> int:
    """The peak so far: memory of tensors on the GPU, or all memory of this process on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
