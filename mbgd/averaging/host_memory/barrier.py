"""A barrier for processes of one host: POSIX semaphores in memory that all of them have mapped.

POSIX (XBD 4.12) makes posting and waiting for a semaphore synchronise memory: what a worker wrote before the barrier,
the others read behind it, also what a third one passed on, on x86 and on Arm alike. A flag in shared memory would do so
on x86 only.
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
"""Before a worker sleeps until it is woken, which takes the kernel some 50 µs. Only where each worker has a core: with
fewer, who spins keeps others from coming."""
SECONDS_BETWEEN_CHECKS = 0.1
"""How often a waiting worker looks whether the others still live."""
SECONDS_BETWEEN_TRIES = 1e-3
"""Where the C library cannot wait by the monotonic clock."""
BYTES_APART = 64  # a cache line each; a semaphore takes 32 bytes on 64-bit Linux

WOKEN, ARRIVED, TICKETS = 0, 1, 2
"""Numbers of the semaphores by which workers are counted, the last two in the main worker's inbox."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


if sys.platform == "linux":  # elsewhere nothing of this is used, and not all of it there
    # PyDLL keeps Python's lock, which for calls that never wait is cheaper than to let it go.
    _quick, _waiting = ctypes.PyDLL(None), ctypes.CDLL(None)
    for _function in (_quick.sem_post, _quick.sem_trywait):
        _function.argtypes = [ctypes.c_void_p]
    _quick.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    _clockwait = getattr(_waiting, "sem_clockwait", None)  # since glibc 2.30
    if _clockwait is not None:
        _clockwait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec)]


def num_rounds(num_workers: int) -> int:
    """In which everybody has heard of everybody."""
    return (num_workers - 1).bit_length()


def bytes_of_inbox(num_workers: int) -> int:
    """Size of the memory in which one worker tells how far it is, and learns that others have come."""
    return BYTES_APART * (1 + max(num_rounds(num_workers), TICKETS + 1))


def make_inbox(inbox: Tensor, *, num_workers: int, num_cores: int) -> None:
    """Make the semaphores of this worker's inbox, before others post there."""
    for number in range(len(inbox) // BYTES_APART - 1):
        is_tickets = number == TICKETS and num_cores < num_workers
        _quick.sem_init(_semaphore(inbox, number), 1, num_workers - 1 if is_tickets else 0)


class Barrier:
    """Everybody waits for everybody; who does not come is named.

    Where each worker has a core they meet in rounds: the dissemination barrier of Hensgen, Finkel and Manber (1988),
    whose time grows with the logarithm of their number. With fewer cores, each round would have the kernel change the
    process on a core, which costs far more than a post. There they are counted, and each sleeps once.
    """

    def __init__(
        self,
        inboxes: Sequence[Tensor],
        process_ids: Sequence[int],
        *,
        rank: int,
        timeout_seconds: float,
        num_cores: int,
    ) -> None:
        """inboxes: of each worker, of type uint8; num_cores: on which the workers may run.

        ProcessLookupError if one of the processes has ended already.
        """
        num_workers = len(inboxes)
        self._inboxes, self._process_ids, self._timeout_seconds = inboxes, process_ids, timeout_seconds
        self._has_cores = num_cores >= num_workers
        self._rounds = [
            (_semaphore(inboxes[(rank + 2**number) % num_workers], number), _semaphore(inboxes[rank], number))
            for number in range(num_rounds(num_workers))
        ]
        self._arrived, self._tickets = _semaphore(inboxes[0], ARRIVED), _semaphore(inboxes[0], TICKETS)
        self._woken = _semaphore(inboxes[rank], WOKEN)
        self._others = [_semaphore(inbox, WOKEN) for inbox in inboxes if inbox is not inboxes[rank]]
        # How often each worker has done what others wait for. Only to find out who is missing: written and read
        # without order.
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
        """Return when every worker has called; WorkersLost if one has ended, or does not come in time."""
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
        """There is a ticket for every worker but one; who gets none is the last, and wakes the others."""
        goal = self._count + 1
        _quick.sem_post(self._arrived)
        if not _quick.sem_trywait(self._tickets):
            self._tell()
            self._wait(self._woken, goal)
            return
        for _ in self._done:  # waiting for each post is what makes everybody's memory visible
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
        """goal: what everybody has done once nobody waits for anybody."""
        start = time.monotonic()
        while _quick.sem_trywait(semaphore):
            if not self._has_cores or time.monotonic() - start > SPIN_SECONDS:
                break
            os.sched_yield()  # there may be other programs
        else:
            return
        while not _came(semaphore, SECONDS_BETWEEN_CHECKS):
            done = [of_worker.value for of_worker in self._done]
            behind = {rank for rank, times in enumerate(done) if times < goal}
            # Who has ended after doing all that others wait for holds nobody up.
            if ended := {self._lives[descriptor] for descriptor, _ in self._ended.poll(0)} & behind:
                raise WorkersLost(self._describe(ended, "has ended"))
            if time.monotonic() - start > self._timeout_seconds and (late := behind & self._waiting_for_nobody(done)):
                limit = f"backend.timeout_seconds={self._timeout_seconds:g}"
                raise WorkersLost(self._describe(late, f"has not come within {limit}: it is stopped, or busy"))

    def _waiting_for_nobody(self, done: Sequence[int]) -> set[int]:
        """Of all workers, those whom nobody keeps from going on. Some may still be in the barrier before this one."""
        if not self._has_cores:
            return {rank for rank, times in enumerate(done) if times == min(done)}
        # After `times` posts a worker waits for as many of the worker that posts to it in that round.
        distances = (2 ** ((times - 1) % len(self._rounds)) for times in done)
        sources = (done[rank - distance] for rank, distance in enumerate(distances))
        return {rank for rank, of_source in enumerate(sources) if done[rank] == 0 or of_source >= done[rank]}

    def _describe(self, ranks: Iterable[int], what: str) -> str:
        lost = [
            f"worker {rank} does not answer any more: process {self._process_ids[rank]} {what}"
            for rank in sorted(ranks)
        ]
        return f"{'; '.join(lost)}. Look at the end of what it printed."


def _semaphore(inbox: Tensor, number: int) -> int:
    return inbox.data_ptr() + BYTES_APART * (1 + number)


def _came(semaphore: int, seconds: float) -> bool:
    """Wait for a post, by a clock that nobody sets; False also when a signal has come."""
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
