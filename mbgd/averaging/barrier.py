"""A barrier for processes of one host: POSIX semaphores in memory that all of them have mapped.

POSIX (XBD 4.12) makes posting and waiting for a semaphore synchronise memory: what a worker wrote before the barrier,
the others read behind it, on x86 and on Arm alike. A flag in shared memory would do so on x86 only.
"""

import ctypes
import os
import select
import sys
import time
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor

from mbgd.errors import WorkersLost

SPIN_SECONDS = 500e-6
"""Before a worker sleeps until it is woken, which takes the kernel some 50 µs."""
SECONDS_BETWEEN_CHECKS = 0.1
"""How often a waiting worker looks whether the others still live."""
BYTES_APART = 64  # a cache line each; a semaphore takes 32 bytes on 64-bit Linux


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


if sys.platform == "linux":  # elsewhere nothing of this is used, and not all of it there
    # PyDLL keeps Python's lock, which for calls that never wait is cheaper than to let it go.
    _quick, _waiting = ctypes.PyDLL(None), ctypes.CDLL(None)
    for _function in (_quick.sem_post, _quick.sem_trywait):
        _function.argtypes = [ctypes.c_void_p]
    _quick.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    _quick.sem_getvalue.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    _waiting.sem_timedwait.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Timespec)]


def bytes_of_inbox(num_workers: int) -> int:
    """Size of the memory in which one worker learns that others have come."""
    return BYTES_APART * num_workers


def make_inbox(inbox: Tensor) -> None:
    """Make a semaphore for every worker in this worker's inbox, before others post there."""
    for address in range(inbox.data_ptr(), inbox.data_ptr() + len(inbox), BYTES_APART):
        _quick.sem_init(address, 1, 0)


class Barrier:
    """Everybody waits for everybody; who does not come is named."""

    def __init__(self, inboxes: Sequence[Tensor], process_ids: Sequence[int], *, rank: int, timeout_seconds: float):
        """inboxes: of each worker, of type uint8. ProcessLookupError if one of the processes has ended already."""
        others = [other for other in range(len(inboxes)) if other != rank]
        self._inboxes, self._process_ids, self._timeout_seconds = inboxes, process_ids, timeout_seconds
        self._mine = [inboxes[other].data_ptr() + BYTES_APART * rank for other in others]
        self._theirs = {other: inboxes[rank].data_ptr() + BYTES_APART * other for other in others}
        self._ended = select.poll()
        self._lives: dict[int, int] = {}
        for other in others:
            descriptor = _process_descriptor(process_ids[other])
            if descriptor is not None:
                self._lives[descriptor] = other
                self._ended.register(descriptor, select.POLLIN)
        weakref.finalize(self, _close, list(self._lives))

    def __call__(self) -> None:
        """Return when every worker has called; WorkersLost if one has ended, or does not come in time."""
        for address in self._mine:
            _quick.sem_post(address)
        for other, address in self._theirs.items():
            if _quick.sem_trywait(address):
                self._wait_for(other, address)

    def _wait_for(self, other: int, address: int) -> None:
        start = time.monotonic()
        while _quick.sem_trywait(address):
            if time.monotonic() - start > SPIN_SECONDS:
                break
            os.sched_yield()  # with more workers than cores, the other may be waiting for this one's
        else:
            return
        while _waiting.sem_timedwait(address, _in(SECONDS_BETWEEN_CHECKS)):
            ended = {self._lives[descriptor] for descriptor, _ in self._ended.poll(0)}
            in_time = time.monotonic() - start < self._timeout_seconds
            if ended or not in_time:
                # Those before `other` have come; their semaphores may be at 0 again.
                absent = [rank for rank in self._theirs if rank >= other and not _value(self._theirs[rank])]
                if lost := [rank for rank in absent if rank in ended or not in_time]:
                    raise WorkersLost(self._describe(lost, ended))

    def _describe(self, lost: Sequence[int], ended: set[int]) -> str:
        late = f"has not come within backend.timeout_seconds={self._timeout_seconds:g}: it is stopped, or busy"
        what = [
            f"worker {rank} does not answer any more: process {self._process_ids[rank]} "
            f"{'has ended' if rank in ended else late}"
            for rank in lost
        ]
        return f"{'; '.join(what)}. Look at the end of what it printed."


def _process_descriptor(process_id: int) -> int | None:
    """What tells that a process has ended, even one that nobody has reaped; None where the kernel has no such thing."""
    try:
        return os.pidfd_open(process_id)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _in(seconds: float) -> _Timespec:
    """So many seconds from now, by the clock that sem_timedwait goes by."""
    nanoseconds = time.time_ns() + int(seconds * 1e9)
    return _Timespec(nanoseconds // 10**9, nanoseconds % 10**9)


def _value(address: int) -> int:
    value = ctypes.c_int()
    _quick.sem_getvalue(address, value)
    return value.value
