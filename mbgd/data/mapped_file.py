"""Bytes of files that all workers of a host map, so that the host holds them once.

What a process writes to a mapped array stays in this process, as if it had read the file into its own memory.
"""

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbgd.errors import UsageError
from mbgd.files.reading import open_regular

Bytes = NDArray[np.uint8]

# Without it Linux refuses to map a file larger than the memory, in case every page is written to.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)


class MappedFile:
    """A file as an array of bytes, read from the disk where they are used.

    A file that is shortened while it is mapped would end the process with SIGBUS, and one that is written to would
    change the examples. `check` sees both; only what happens between a check and the reading after it stays unseen.
    """

    def __init__(self, path: Path) -> None:
        """FileNotFoundError, or UsageError if it is no regular file or cannot be mapped."""
        self.path = path.resolve()
        with open_regular(self.path) as file:
            self._stat = os.fstat(file.fileno())
            self.bytes = map_privately(file.fileno(), self._stat.st_size)

    def check(self) -> None:
        """UsageError if the file has been written to since it was mapped."""
        try:
            now = self.path.stat()
        except OSError:
            return  # removed or out of reach by name: the pages stay
        is_other = (now.st_dev, now.st_ino) != (self._stat.st_dev, self._stat.st_ino)  # replaced: ours stays, too
        if not is_other and (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise UsageError(
                f"{self.path} has been written to since this run opened it: {self._stat.st_size:,} bytes then, "
                f"{now.st_size:,} now. The examples would no longer be the same. Write a new file and rename it to "
                "replace the old one; a run that has opened the old one goes on with it."
            )


def map_privately(descriptor: int, num_bytes: int) -> Bytes:
    """The open file's bytes; pages that are only read are shared with all that map them. UsageError if impossible."""
    if num_bytes == 0:
        return np.empty(0, np.uint8)
    try:
        mapped = mmap.mmap(
            descriptor, num_bytes, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{num_bytes:,} bytes cannot be mapped into memory: {error}.") from error
    return np.frombuffer(mapped, np.uint8)
