"""A barrier for processes of one host: POSIX semaphores in memory that all of them map.

By POSIX (XBD 4.12), posting and waiting for a semaphore synchronise memory: after the barrier every worker sees all
writes made before it, directly or passed on by a third worker, on x86 and on Arm. A flag in shared memory would order
memory on x86 only.
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
"""How long a waiting worker spins before it sleeps; waking takes the kernel some 50 µs. Only where each worker has a
core: with fewer, a spinning worker keeps others from running."""
SECONDS_BETWEEN_CHECKS = 0.1
"""A waiting worker checks this often that the others are alive."""
SECONDS_BETWEEN_TRIES = 1e-3
"""Polling interval where the C library has no sem_clockwait."""
BYTES_APART = 64  # a cache line each; a semaphore takes 32 bytes on 64-bit Linux

WOKEN, ARRIVED, TICKETS = 0, 1, 2
"""Semaphore numbers of the counting barrier; the last two are in the main worker's inbox."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


if sys.platform == "linux":  # other systems lack some of these, and use none
    # PyDLL keeps the GIL; for calls that never wait that is cheaper than releasing it.
    _quick, _waiting = ctypes.PyDLL(None), ctypes.CDLL(None)
    for _function in (_quick.sem_post, _quick.sem_trywait):
        _function.argtypes = [ctypes.c_void_p]
    _quick.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    _clockwait = getattr(_waiting, "sem_clockwait", None)  # since glibc 2.30
    if _clockwait is not None:
        _clockwait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec)]


def num_rounds(num_workers: int) -> int:
    """Rounds of the dissemination barrier: log2(num_workers), rounded up."""
    return (num_workers - 1).bit_length()


def bytes_of_inbox(num_workers: int) -> int:
    """Size of one worker's inbox: its progress counter and the semaphores that others post to."""
    return BYTES_APART * (1 + max(num_rounds(num_workers), TICKETS + 1))


def make_inbox(inbox: Tensor, *, num_workers: int, num_cores: int) -> None:
    """Initialise the semaphores of this worker's inbox; before others post to them."""
    for number in range(len(inbox) // BYTES_APART - 1):
        is_tickets = number == TICKETS and num_cores < num_workers
        _quick.sem_init(_semaphore(inbox, number), 1, num_workers - 1 if is_tickets else 0)


class Barrier:
    """All workers wait for all; the error names the workers that do not come.

    Where each worker has a core: the dissemination barrier of Hensgen, Finkel and Manber (1988), whose time grows with
    the logarithm of the number of workers. With fewer cores, each of its rounds would cost a context switch, far more
    than a post. There the workers are counted, and each sleeps once.
    """

    def __init__(
        self,
        inboxes: Sequence[Tensor],
        process_ids: Sequence[int],
        *,
        ranks: Sequence[int],
        rank: int,
        timeout_seconds: float,
        num_cores: int,
    ) -> None:
        """inboxes: each worker's, uint8; ranks: their names in errors; rank: this worker's number among them;
        num_cores: the cores that the workers may run on.

        ProcessLookupError if one of the processes has ended already.
        """
        num_workers = len(inboxes)
        self._inboxes, self._process_ids, self._timeout_seconds = inboxes, process_ids, timeout_seconds
        self._ranks = ranks
        self._has_cores = num_cores >= num_workers
        self._rounds = [
            (_semaphore(inboxes[(rank + 2**number) % num_workers], number), _semaphore(inboxes[rank], number))
            for number in range(num_rounds(num_workers))
        ]
        self._arrived, self._tickets = _semaphore(inboxes[0], ARRIVED), _semaphore(inboxes[0], TICKETS)
        self._woken = _semaphore(inboxes[rank], WOKEN)
        self._others = [_semaphore(inbox, WOKEN) for inbox in inboxes if inbox is not inboxes[rank]]
        # How often each worker has posted what others wait for. Only used to find out who is missing: reads and writes
        # are not ordered.
        self._done = [ctypes.c_uint64.from_address(inbox.data_ptr()) for inbox in inboxes]
        self._mine, self._count = self._done[rank], 0
        self._ended = select.poll()
        self._lives: dict[int, int] = {}
        for other in set(range(num_workers)) - {rank}:
            descriptor = _process_descriptor(process_ids[other])
            if descriptor is not None:
                self._lives[descriptor] = other
                self._ended.register(descriptor, select.POLLIN)
        weakref.finalize(self, _close, list(self._lives))

    def __call__(self) -> None:
        """Return when every worker has called; WorkersLost if one has ended or does not come in time."""
        if self._has_cores:
            self._meet_in_rounds()
        else:
            self._be_counted()

    def _meet_in_rounds(self) -> None:
        """In round r, worker w posts to worker w + 2^r and waits for worker w − 2^r."""
        goal = self._count + len(self._rounds)
        for theirs, mine in self._rounds:
            _quick.sem_post(theirs)
            self._tell()
            if _quick.sem_trywait(mine):
                self._wait(mine, goal)

    def _be_counted(self) -> None:
        """There is one ticket less than workers; the worker that gets none is the last and wakes the others."""
        goal = self._count + 1
        _quick.sem_post(self._arrived)
        if not _quick.sem_trywait(self._tickets):
            self._tell()
            self._wait(self._woken, goal)
            return
        for _ in self._done:  # waiting for each worker's post makes its writes visible
            self._wait(self._arrived, goal)
        for _ in self._others:
            _quick.sem_post(self._tickets)
        for other in self._others:
            _quick.sem_post(other)
        self._tell()

    def _tell(self) -> None:
        self._count += 1
        self._mine.value = self._count

    def _wait(self, semaphore: int, goal: int) -> None:
        """goal: the count that every worker reaches in this barrier."""
        start = time.monotonic()
        while _quick.sem_trywait(semaphore):
            if not self._has_cores or time.monotonic() - start > SPIN_SECONDS:
                break
            os.sched_yield()  # other programs may need the core
        else:
            return
        while not _came(semaphore, SECONDS_BETWEEN_CHECKS):
            done = [of_worker.value for of_worker in self._done]
            behind = {rank for rank, times in enumerate(done) if times < goal}
            # A worker that ended after its last post holds nobody up.
            if ended := {self._lives[descriptor] for descriptor, _ in self._ended.poll(0)} & behind:
                raise WorkersLost(self._describe(ended, "has ended"))
            if time.monotonic() - start > self._timeout_seconds and (late := behind & self._waiting_for_nobody(done)):
                limit = f"backend.timeout_seconds={self._timeout_seconds:g}"
                raise WorkersLost(self._describe(late, f"has not come within {limit}: it is stopped, or busy"))

    def _waiting_for_nobody(self, done: Sequence[int]) -> set[int]:
        """The workers that wait for no other worker. Some may still be in the barrier before this one."""
        if not self._has_cores:
            return {rank for rank, times in enumerate(done) if times == min(done)}
        # After `times` posts, a worker waits until its source in that round has made `times` posts, too.
        distances = (2 ** ((times - 1) % len(self._rounds)) for times in done)
        sources = (done[rank - distance] for rank, distance in enumerate(distances))
        return {rank for rank, of_source in enumerate(sources) if done[rank] == 0 or of_source >= done[rank]}

    def _describe(self, ranks: Iterable[int], what: str) -> str:
        lost = [
            f"worker {self._ranks[rank]} does not answer any more: process {self._process_ids[rank]} {what}"
            for rank in sorted(ranks)
        ]
        return f"{'; '.join(lost)}. Look at the end of its output."


def _semaphore(inbox: Tensor, number: int) -> int:
    return inbox.data_ptr() + BYTES_APART * (1 + number)


def _came(semaphore: int, seconds: float) -> bool:
    """Wait for a post by the monotonic clock; False also when a signal interrupts the wait."""
    deadline = time.monotonic_ns() + int(seconds * 1e9)
    if _clockwait is not None:
        until = _Timespec(deadline // 10**9, deadline % 10**9)
        return not _clockwait(semaphore, time.CLOCK_MONOTONIC, until)
    while time.monotonic_ns() < deadline:
        if not _quick.sem_trywait(semaphore):
            return True
        time.sleep(SECONDS_BETWEEN_TRIES)
    return False


def _process_descriptor(process_id: int) -> int | None:
    """A pidfd, readable once the process has ended, even as a zombie; None where the kernel has no pidfds."""
    try:
        return os.pidfd_open(process_id)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
