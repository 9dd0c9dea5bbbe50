"""The connections of a process group over gloo, so that it can be left while exchanges are under way.

A lost worker can leave two others in exchanges that wait for each other: one has failed to send to the lost worker,
and so sends to nobody. Both would wait for the timeout, and freeing the group waits for its exchanges. torch 2.13 has
no abort for gloo (`ProcessGroupGloo.abort` does nothing); an exchange whose connection is shut down fails at once, on
both ends.
"""

import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OPEN_FILES = Path("/proc/self/fd")


class Connections:
    """The connections between this process and others of its host that are made inside `noted`."""

    def __init__(self) -> None:
        self._made: set[tuple[int, int]] = set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        before = _sockets()
        yield
        self._made |= _sockets() - before

    def shut_down(self) -> None:
        """Those that are still open; what has been sent arrives."""
        for descriptor, _ in self._made & _sockets():
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as one:  # not all are connected
                is_tcp = one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM
                if is_tcp and one.getpeername()[0] == one.getsockname()[0]:
                    one.shutdown(socket.SHUT_RDWR)
        self._made.clear()


def _sockets() -> set[tuple[int, int]]:
    """This process's, each as descriptor and inode, for descriptors are used again."""
    found = set()
    for file in [*OPEN_FILES.iterdir()] if sys.platform == "linux" else ():
        with suppress(OSError):  # closed meanwhile
            status = file.stat()
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(file.name), status.st_ino))
    return found
