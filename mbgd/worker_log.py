"""What a worker prints, warns of and dies of, also in a file of its own: `logs/worker-3.log`."""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class Tee:
    """A text stream that also goes into a file, but for what a terminal redraws (progress bars)."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        if "\x1b" not in text and "\r" not in text:
            with suppress(OSError):  # a full disk is no reason to stop for this
                self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def start_log(path: Path, rank: int, num_workers: int) -> None:
    """From now on until the process ends, standard output and error go into the file too; appended to what is there.

    What C libraries write by themselves (NCCL_DEBUG) is not in it.
    """
    path.parent.mkdir(exist_ok=True)
    file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"--- {now} worker {rank} of {num_workers}, process {os.getpid()} on {socket.gethostname()}\n")
    sys.stdout, sys.stderr = Tee(sys.stdout, file), Tee(sys.stderr, file)
