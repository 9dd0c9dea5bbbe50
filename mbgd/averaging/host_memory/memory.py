"""Memory that all workers of one host read and write, and a barrier in it.

Each piece is an anonymous file in memory (memfd_create): it has no name, does not use /dev/shm, and is freed with the
last process that maps it, however that ends. The other workers map it through /proc/<process>/fd, which the kernel
opens to the same user alone; the descriptor is closed once all have mapped it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mbgd.averaging.host_memory.barrier import Barrier, bytes_of_inbox, make_inbox
from mbgd.errors import WorkersLost
from mbgd.files.memory import available_bytes
from mbgd.workers.group import Workers
from mbgd.workers.roll_call import seconds_before_roll_call

T = TypeVar("T")


class CannotShareError(Exception):
    """The workers cannot share memory; the message says why. Raised on every worker alike."""


@dataclass(frozen=True)
class _Failed:
    why: str


class HostMemory:
    """Pieces of memory that all workers of this host have mapped, and a barrier between them.

    Every worker of every host makes one, and all call its methods in the same order. Raises CannotShareError, also
    where no two workers are on the same host.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.hosts = _ranks_by_host(self._agree(_try(_host)))
        """The ranks of each host's workers."""
        if workers.num_workers > 1 and len(self.hosts) == workers.num_workers:
            raise CannotShareError("workers 0 and 1 are on different hosts, or in different containers")
        self.members = next(host for host in self.hosts if workers.rank in host)
        """The ranks of this host's workers."""
        self.rank = self.members.index(workers.rank)
        """This worker's number among them."""
        process_ids = self._of_members(workers.gather_values(os.getpid()))
        affinities = self._of_members(workers.gather_values(sorted(os.sched_getaffinity(0))))
        num_cores = len({core for of_worker in affinities for core in of_worker})
        inboxes = self.allocate(bytes_of_inbox(len(self.members)))
        make_inbox(inboxes[self.rank], num_workers=len(self.members), num_cores=num_cores)
        workers.barrier()  # every inbox is made
        seconds = workers.timeout_seconds
        try:
            self._barrier = Barrier(
                inboxes,
                process_ids,
                ranks=self.members,
                rank=self.rank,
                timeout_seconds=seconds if len(self.hosts) == 1 else seconds_before_roll_call(seconds),
                num_cores=num_cores,
            )
        except ProcessLookupError as error:
            raise WorkersLost("a worker has ended at the start. Look at the end of its output.") from error
        self._boards: dict[tuple[torch.Size, torch.dtype, bool], _Boards] = {}

    def barrier(self) -> None:
        """Return when every worker of this host has called; WorkersLost if one has ended or does not come in time.

        On several hosts DistError instead, after which the roll is called: a worker here may have ended because of one
        that is lost on another host.
        """
        try:
            self._barrier()
        except WorkersLost as error:
            if len(self.hosts) == 1:
                raise
            raise dist.DistError(str(error)) from error

    def _of_members(self, of_workers: Sequence[T]) -> list[T]:
        return [of_workers[rank] for rank in self.members]

    def allocate(self, num_bytes: int) -> list[Tensor]:
        """`num_bytes` of zeroed shared memory for each worker of this host, by rank: uint8."""
        return self._mapped(
            num_bytes, lambda paths: [_map(path, num_bytes) for path in self._of_members(paths)], makes=True
        )

    def allocate_once(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """`num_bytes` of zeroed memory that all workers of this host share, mapped twice: uint8.

        Writes to the first are seen by all. The second shows them too, but each page only until this process writes to
        it there: from then on the page is a copy of its own.
        """
        num_bytes = max(num_bytes, 1)
        shared, own = self._mapped(
            num_bytes,
            lambda paths: [_map(paths[self.members[0]], num_bytes, shared=shared) for shared in (True, False)],
            makes=self.rank == 0,
        )
        return shared, own

    def _mapped(self, num_bytes: int, map_: Callable[[list[str]], list[Tensor]], *, makes: bool) -> list[Tensor]:
        """map_: given every worker's path by rank. makes: whether this worker makes a file."""
        descriptor = _try(lambda: _make_file(num_bytes)) if makes else None
        path = descriptor if isinstance(descriptor, _Failed) else f"/proc/{os.getpid()}/fd/{descriptor}"
        try:
            paths = self._agree(path)
            pieces = _try(lambda: map_(paths))
            self._agree(pieces if isinstance(pieces, _Failed) else None)
        finally:
            if isinstance(descriptor, int):
                os.close(descriptor)  # the mappings stay; from here on no other process can map it
        assert isinstance(pieces, list)
        return pieces

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The `values` of each worker of this host, valid until the second call after this one; for small tensors."""
        of_workers = self._write(values, is_read_at_once=True)
        self.barrier()
        return of_workers

    def put(self, values: Tensor) -> list[Tensor]:
        """The `values` of each worker of this host, to be read after the next barrier, before the next call of this."""
        return self._write(values, is_read_at_once=False)

    def _write(self, values: Tensor, *, is_read_at_once: bool) -> list[Tensor]:
        kind = values.shape, values.dtype, is_read_at_once
        if kind not in self._boards:
            pieces = [piece.view(values.dtype) for piece in self.allocate(2 * values.nbytes)]
            self._boards[kind] = _Boards([[half.view(values.shape) for half in piece.chunk(2)] for piece in pieces])
        boards = self._boards[kind]
        # Two boards in turn: a worker that came to the last call's barrier has finished reading the board before it,
        # which is the one written now.
        boards.turn = 1 - boards.turn
        boards.of_workers[self.rank][boards.turn].copy_(values)
        return [of_worker[boards.turn] for of_worker in boards.of_workers]

    def _agree(self, result: T | _Failed) -> list[T]:
        """Every worker's result (JSON values) by rank; CannotShareError on every worker if one has failed."""
        told = self._workers.gather_values({"why": result.why} if isinstance(result, _Failed) else {"result": result})
        for rank, one in enumerate(told):
            if "why" in one:
                raise CannotShareError(f"worker {rank} cannot: {one['why']}")
        return [one["result"] for one in told]


@dataclass
class _Boards:
    of_workers: list[list[Tensor]]
    """Two per worker."""
    turn: int = 0


def _try(make: Callable[[], T]) -> T | _Failed:
    try:
        return make()
    except (OSError, RuntimeError) as error:
        return _Failed(str(error).splitlines()[0])


def _ranks_by_host(hosts: Sequence[Sequence[str]]) -> list[list[int]]:
    """hosts: each worker's, by rank → the ranks of each host, that of worker 0 first."""
    by_host: dict[tuple[str, ...], list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(tuple(host), []).append(rank)
    return list(by_host.values())


def _host() -> list[str]:
    """Equal for processes that share a PID namespace, and so can map each other's memory.

    Different network namespaces count as different hosts: whoever made them wants traffic to cross the network.
    """
    if sys.platform != "linux":
        raise OSError(f"this is {sys.platform}, not Linux")
    namespaces = (str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "net"))
    return [Path("/proc/sys/kernel/random/boot_id").read_text(), *namespaces]


def _make_file(num_bytes: int) -> int:
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise OSError(f"{num_bytes:,} bytes of shared memory cannot be allocated: {available:,} are available")
    descriptor = os.memfd_create("mbgd", os.MFD_CLOEXEC)
    os.fchmod(descriptor, 0o600)
    try:
        # Allocated at once: a limit, such as a container's, is an error here, not a SIGBUS in a later write.
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        os.close(descriptor)
        raise OSError(f"{num_bytes:,} bytes of shared memory cannot be allocated: {error.strerror}") from error
    return descriptor


def _map(path: str, num_bytes: int, *, shared: bool = True) -> Tensor:
    return torch.from_file(path, shared=shared, size=num_bytes, dtype=torch.uint8)
