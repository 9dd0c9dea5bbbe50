"""A worker's output, warnings and traceback also go into its own file, such as `logs/worker-3.log`.

Output is optional: if its reader is gone or the disk is full, training goes on without it.
"""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

DESCRIPTORS = {"stdout": 1, "stderr": 2}


class _LogFile:
    """A text file whose failures are reported once; text that cannot be written is lost."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._has_failed = False

    @property
    def name(self) -> str:
        return self._file.name

    def write(self, text: str) -> int:
        try:
            self._file.write(text)
        except (OSError, ValueError) as error:
            self._say(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except (OSError, ValueError) as error:
            self._say(error)

    def _say(self, error: OSError | ValueError) -> None:
        if not self._has_failed:
            self._has_failed = True
            message = f"warning: the log {self._file.name} cannot be written to ({error}). Training goes on."
            print(message, file=sys.stderr, flush=True)


class Tee:
    """Standard output or error, copied into a file, except for text that a terminal redraws (progress bars).

    If the stream fails (its reader has ended, its terminal is gone, its disk is full), nothing more goes there, and
    the other stream gets a warning. Text that a non-blocking pipe cannot take at once is lost.
    """

    def __init__(self, stream: TextIO, name: str, file: _LogFile | None = None) -> None:
        """name: stdout or stderr."""
        self._stream, self._name, self.file = stream, name, file
        self._is_given_up = False

    def write(self, text: str) -> int:
        if self.file is not None and "\x1b" not in text and "\r" not in text:
            self.file.write(text)
        try:
            self._stream.write(text)
        except BlockingIOError:
            pass
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        if self._is_given_up:
            return
        self._is_given_up = True
        # From here on everything goes to /dev/null: buffered text, output of C libraries and child processes, and the
        # last flush, whose failure would become this process's exit code.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        other = sys.stderr if self._name == "stdout" else sys.stdout
        print(
            f"warning: {self._name} cannot be written to ({error}); nothing more goes there. Training goes on.",
            file=other,
            flush=True,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
    file: _LogFile | None = None
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        path.parent.mkdir(exist_ok=True)
        file = _LogFile(path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1))
    except OSError as error:
        print(f"warning: the log {path} cannot be opened ({error}). Training goes on.", file=sys.stderr, flush=True)
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
    print(text, file=getattr(sys.stderr, "file", None) or sys.stderr, flush=True)


def write_to_log_alone(text: str) -> str:
    """Write text into the log only; returns the log's path. Without a log: writes nothing and returns ""."""
    file = getattr(sys.stderr, "file", None)
    if file is None:
        return ""
    file.write(text + "\n")
    file.flush()
    return str(file.name)
