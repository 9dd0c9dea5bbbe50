"""Tracking from a process of its own, which reads the metrics from the run's folder.

The file `metrics.jsonl` is the queue: it has room for any delay, and nothing in it is lost. So a slow disk, a silent
server, or a library's import or crash costs training nothing: no thread of theirs runs beside training, and training
waits for no call of theirs. The process has its own session; if the training process is killed, it lives on and reports
that.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from mbgd.tracking.base import Ending, Metrics

MOST_STARTS = 3
SECONDS_FOR_ANOTHER_START = 10.0
SECONDS_TO_DIE = 5.0
"""Time for the kernel to end a killed process; one that waits for a dead file system never ends."""

MOST_MESSAGE_CHARACTERS = 4000
"""Escaped, they fit a pipe's 64 KiB, so that writing to a process that does not read never blocks."""


class Follower:
    """Starts `mbgd.tracking.follow`, shows its messages, and restarts it if it dies, twice at most."""

    def __init__(self, sink: str, folder: Path, *, finish_seconds: float, quiet: bool = False) -> None:
        """sink: one of follow.py's; finish_seconds: how long the end of training waits for it; quiet: only warn."""
        self._sink, self._folder, self._finish_seconds, self._quiet = sink, folder, finish_seconds, quiet
        self._num_starts = 0
        (folder / sink).mkdir(exist_ok=True)
        self._start()

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        self._show_messages()
        if self._num_starts < MOST_STARTS and self._process.poll() is not None:
            self._start()

    def close(self, ending: Ending) -> None:
        deadline = time.monotonic() + self._finish_seconds
        while not self._ends_well(ending, deadline):
            if self._num_starts == MOST_STARTS:
                print(
                    f"warning: {self._sink} failed; all metrics are in {self._folder}/metrics.jsonl, and the "
                    f"reason is in {self._folder}/{self._sink}/output.log.",
                    flush=True,
                )
                return
            self._start()
            deadline = time.monotonic() + SECONDS_FOR_ANOTHER_START

    def _start(self) -> None:
        self._num_starts += 1
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        with _append(self._folder / self._sink / "output.log") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mbgd.tracking.follow", self._sink, str(self._folder), str(self._num_starts)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C must reach only training, which then reports how it ended
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def _ends_well(self, ending: Ending, deadline: float) -> bool:
        """Send the ending to the process and wait for it until the deadline; whether it exits with 0."""
        assert self._process.stdin is not None
        order = json.dumps({"outcome": ending.outcome.value, "message": ending.message[:MOST_MESSAGE_CHARACTERS]})
        try:
            with self._process.stdin as orders:
                orders.write(order.encode() + b"\n")
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except OSError:
            pass  # it has died; its exit code is checked below
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._show_messages()
        return self._process.wait(SECONDS_TO_DIE) == 0

    def _show_messages(self) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.read()  # None: nothing new
        for line in [] if self._quiet else (said or b"").decode(errors="replace").splitlines():
            print(f"{self._sink:<11} {line}", flush=True)


def _append(path: Path) -> BinaryIO:
    """O_NONBLOCK: if a named pipe has taken the file's place, opening fails instead of waiting for a reader."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666), "ab")
