"""A worker ends with the process that started it: torchrun, or a sweep.

Call this before any slow import: until the kernel has been asked, the parent's death goes unnoticed.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

PARENT = "MBGD_PARENT"
"""Environment variable with the process id of mbgd's own launchers."""

PR_SET_PDEATHSIG = 1  # of linux/prctl.h

NAME_OF_TORCHRUN = "pt_elastic"
"""The name that torchrun gives its process."""


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the torchrun or sweep that started this process dies; exit if it already has.

    Does nothing in a process that neither has started, and outside Linux.
    """
    told = os.environ.pop(PARENT, None)  # this process's children must not inherit it
    if sys.platform != "linux" or (told is None and "TORCHELASTIC_RUN_ID" not in os.environ):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # Checked after the call: from here on, the kernel notices.
    if not _has_parent(None if told is None else int(told)):
        sys.exit("error: the process that started this worker has ended")


def _has_parent(told: int | None) -> bool:
    """Whether process `told`, or without it anything that may be torchrun, is among the ancestors.

    A wrapper process may lie between. An orphan's only ancestors are the processes that adopt orphans.
    """
    try:
        ancestors = list(_ancestors())
        if told is not None:
            return told in ancestors
        return any(_may_be_torchrun(ancestor) for ancestor in ancestors)
    except FileNotFoundError:  # /proc does not show other users' processes
        return told is None or os.getppid() == told


def _ancestors() -> Iterator[int]:
    process = os.getppid()
    while process > 0:
        yield process
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _may_be_torchrun(process: int) -> bool:
    if Path(f"/proc/{process}/comm").read_text().strip() == NAME_OF_TORCHRUN:
        return True
    try:  # torchrun's Python interface, called from a script
        return Path(f"/proc/{process}/exe").samefile("/proc/self/exe")
    except PermissionError:
        return False
