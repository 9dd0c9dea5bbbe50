"""A lock on an open file, which ends with the process, however that ends.

It is a record lock (`lockf`): it holds across the hosts of a shared file system, and child processes do not inherit it.
`filelock` takes `flock`, which a forked loader process would go on holding after its worker has died.
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mbgd.files.reading import open_regular

HELD = {errno.EAGAIN, errno.EACCES}


def lock(file: BinaryIO, *, wait: bool) -> bool:
    """Lock the file until it is closed; False where another process holds it and there is no waiting for its end.

    True also on a file system without locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in HELD
    return True


def is_locked(file: BinaryIO) -> bool:
    """Whether another process holds the file's lock; False also on a file system without locks.

    A shared lock is asked for and given back at once: that needs no right to write. Not for a file that this process
    has locked: its own lock would be given back.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_UN)
    except OSError as error:
        return error.errno in HELD
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which is made; wait as long as another process holds it."""
    with open_regular(path, "r+b") as file:
        lock(file, wait=True)
        yield
