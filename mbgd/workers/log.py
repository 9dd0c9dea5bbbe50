"""A worker's output, warnings and traceback also go into its own file, such as `logs/worker-3.log`.

Output is optional: if its reader is gone or the disk is full, training goes on without it. `logging` cannot do this:
prints, warnings and tracebacks go to `sys.stdout` and `sys.stderr` directly, and a failure in Python's last flush
becomes the process's exit code. torchrun's `--tee` cannot either: it names its files before the run has a folder, and
one worker has no torchrun.
"""

import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

DESCRIPTORS = {"stdout": 1, "stderr": 2}


class _MayFail(ABC):
    """A text stream whose first failure is reported; text that cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_failed = False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except BlockingIOError:
            pass  # a pipe that takes no more just now
        except (OSError, ValueError) as error:
            if not self._has_failed:
                self._has_failed = True
                self._fail(error)

    @abstractmethod
    def _fail(self, error: OSError | ValueError) -> None:
        """What to do at the first failure."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LogFile(_MayFail):
    """The log file. Writing is tried again after a failure: the disk may have room later."""

    def _fail(self, error: OSError | ValueError) -> None:
        _warn(f"the log {self.name} cannot be written to ({error})", sys.stderr)


class Tee(_MayFail):
    """Standard output or error, copied into a file, except for text that a terminal redraws (progress bars).

    If the stream fails (its reader has ended, its terminal is gone, its disk is full), nothing more goes there, and the
    other stream gets a warning.
    """

    def __init__(self, stream: TextIO, name: str, file: LogFile | None = None) -> None:
        """name: stdout or stderr."""
        super().__init__(stream)
        self._name, self.file = name, file

    def write(self, text: str) -> int:
        if self.file is not None and "\x1b" not in text and "\r" not in text:
            self.file.write(text)
        return super().write(text)

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
        super().flush()

    def _fail(self, error: OSError | ValueError) -> None:
        # From here on everything goes to /dev/null: buffered text, output of C libraries and child processes, and the
        # last flush, whose failure would become this process's exit code.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        other = sys.stderr if self._name == "stdout" else sys.stdout
        _warn(f"{self._name} cannot be written to ({error}); nothing more goes there", other)


def guard_output() -> None:
    """Until the process ends, a failing standard output or error is given up and does not end the process."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed at the start: the next file opened would get this descriptor, and the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, descriptor in DESCRIPTORS.items():
        stream = getattr(sys, name) or os.fdopen(descriptor, "w", closefd=False)
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a character
        setattr(sys, name, Tee(stream, name))


def start_log(path: Path, rank: int, num_workers: int) -> None:
    """Until the process ends, append standard output and error to the file, too.

    Output that C libraries write themselves (NCCL_DEBUG) is not in it.
    """
    file: LogFile | None = None
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        path.parent.mkdir(exist_ok=True)
        file = LogFile(path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1))
    except OSError as error:
        _warn(f"the log {path} cannot be opened ({error})", sys.stderr)
    else:
        file.write(f"--- {now} worker {rank} of {num_workers}, process {os.getpid()} on {socket.gethostname()}\n")
    for name in DESCRIPTORS:
        stream = getattr(sys, name)
        if isinstance(stream, Tee) and stream.file is None:
            stream.file = file
        else:
            setattr(sys, name, Tee(stream, name, file))


def write_to_log(text: str) -> None:
    """Write details into the log only; to standard error if there is no log."""
    print(text, file=_log() or sys.stderr, flush=True)


def write_to_log_alone(text: str) -> str:
    """Write text into the log only; returns the log's path. Without a log: writes nothing and returns ""."""
    file = _log()
    if file is None:
        return ""
    file.write(text + "\n")
    file.flush()
    return str(file.name)


def _log() -> LogFile | None:
    file: LogFile | None = getattr(sys.stderr, "file", None)
    return file


def _warn(problem: str, stream: TextIO) -> None:
    print(f"warning: {problem}. Training goes on.", file=stream, flush=True)
