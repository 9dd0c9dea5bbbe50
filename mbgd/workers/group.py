"""The workers of a run: their process group, rank, device, and the few small collectives that the program uses.

One process is a group of size 1: the same calls work and cost nothing.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mbgd.workers.devices import own_device
from mbgd.workers.membership import Membership
from mbgd.workers.messages import bytes_of, empty, message, value_of
from mbgd.workers.parent import end_with_parent
from mbgd.workers.place import place
from mbgd.workers.process_group import ProcessGroup
from mbgd.workers.process_settings import remembered


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among the workers of a run."""

    rank: int = 0
    num_workers: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "gloo"
    timeout_seconds: float = 600.0
    """How long an exchange waits for a worker."""
    go_on: bool = False
    """Whether the others go on where one is lost (recovery=continue)."""

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.device.index is None:
            object.__setattr__(self, "device", torch.device("cuda", torch.cuda.current_device()))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def exchange_device(self) -> torch.device:
        """The device that tensors must be on for collectives other than all_reduce and broadcast.

        With gloo that is the CPU: gloo takes GPU tensors in all_reduce and broadcast only. See docs/gpu.md.
        """
        return torch.device("cpu") if self.backend == "gloo" else self.device

    def sum_(self, values: Tensor) -> Tensor:
        """Sum `values` over the workers, in place, on every worker."""
        if self.num_workers > 1:
            dist.all_reduce(values)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """Elementwise maximum of `values` over the workers, in place, on every worker."""
        if self.num_workers > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def broadcast(self, value: Any, *, source: int = 0) -> Any:
        """The `value` of the worker `source`, the main one by default, on every worker.

        value: anything JSON can hold (None, bool, int, float, str, lists, dicts with str keys); tuples arrive as lists.
        TypeError for anything else.
        """
        mine = message(value)
        if self.num_workers == 1:
            return value_of(mine)
        mine = mine.to(self.exchange_device)
        length = torch.tensor([len(mine)], device=mine.device)
        dist.broadcast(length, src=source)
        received = mine if self.rank == source else mine.new_empty(int(length.item()))
        dist.broadcast(received, src=source)
        return value_of(received)

    def broadcast_(self, values: Tensor, *, source: int = 0) -> None:
        """Overwrite `values` with those of the worker `source`, the main one by default."""
        if self.num_workers > 1:
            dist.broadcast(values, src=source)

    def gather_values(self, value: Any) -> list[Any]:
        """Every worker's `value` by rank, on every worker; for the types allowed see `broadcast`."""
        mine = message(value)
        if self.num_workers == 1:
            return [value_of(mine)]
        mine = mine.to(self.exchange_device)
        lengths = [int(length) for length in self.all_gather(torch.tensor([len(mine)], device=mine.device))]
        padded = self.all_gather(F.pad(mine, (0, max(lengths) - len(mine))))
        return [value_of(values[:length]) for values, length in zip(padded, lengths, strict=True)]

    def gather_if_unlike(self, value: Any) -> list[Any]:
        """`gather_values` where values differ between workers; an empty list, for the price of a few bytes, otherwise.

        With thousands of workers, even reading the same long message from each takes seconds.
        """
        digest = hashlib.sha256(bytes(message(value).numpy())).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(self.exchange_device)
        # ~x reverses the order, so max(~x) = ~min(x). The maximum equals the minimum only if all workers agree.
        largest, smallest = self.max_(torch.cat([mine, ~mine])).chunk(2)
        return [] if torch.equal(largest, ~smallest) else self.gather_values(value)

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """Every worker's `values` by rank, on their device; all have the same shape and dtype."""
        mine = values.to(self.exchange_device)
        gathered = [torch.empty_like(mine) for _ in range(self.num_workers)]
        dist.all_gather(gathered, mine)
        return [of_worker.to(values.device) for of_worker in gathered]

    def collect(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All workers' tensors in rank order, on the main worker; an empty list on the others.

        tensors: on the CPU, as many as this worker has, of any shapes.
        """
        kinds = self.gather_values([(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors])
        if not self.is_main:
            for tensor in tensors:
                if tensor.numel():
                    dist.send(bytes_of(tensor).to(self.exchange_device), dst=0)
            return []
        collected = list(tensors)
        for rank, of_worker in enumerate(kinds[1:], start=1):
            for shape, dtype in of_worker:
                values = empty(shape, dtype)
                if values.numel():
                    received = torch.empty(values.nbytes, dtype=torch.uint8, device=self.exchange_device)
                    dist.recv(received, src=rank)
                    bytes_of(values).copy_(received)
                collected.append(values)
        return collected

    def barrier(self) -> None:
        if self.num_workers > 1:
            dist.barrier()


def num_workers_from_environment() -> int:
    """WORLD_SIZE, as torchrun or another launcher sets it; 1 without a launcher."""
    return place().num_workers


@contextmanager
def start_workers(
    backend: str = "auto",
    timeout_seconds: float = 600.0,
    *,
    device: str = "auto",
    membership: Membership | None = None,
) -> Iterator[Workers]:
    """Join the process group that torchrun's environment variables describe; leave it at the end.

    backend: auto (nccl where every worker of this host has a GPU of its own, otherwise gloo), gloo or nccl.
    device: auto (a GPU with nccl, otherwise the CPU), cpu or cuda; over gloo several workers may share a GPU.
    membership: names the workers instead; GroupChanged where some of them are lost and the others go on.
    """
    end_with_parent()
    if membership is not None:
        os.environ.update(membership.environment())
    rank, num_workers, local_rank, local_num_workers = place()
    put_back = remembered()
    backend, worker_device = own_device(backend, device, local_rank, local_num_workers)
    group = None
    if num_workers > 1:
        group = ProcessGroup(rank, num_workers, backend, worker_device, timeout_seconds, membership)
    try:
        if group is not None:
            group.form()
        yield Workers(
            rank=rank,
            num_workers=num_workers,
            local_rank=local_rank,
            device=worker_device,
            backend=backend,
            timeout_seconds=timeout_seconds,
            go_on=membership is not None,
        )
        if group is not None:
            dist.barrier()
    except RuntimeError as error:
        if group is not None:
            group.explain(error)
        raise
    finally:
        put_back()
        if group is not None:
            group.leave()
    # Only after success: destroying nccl's group could wait for a failed peer.
    if num_workers > 1 and dist.is_initialized():
        dist.destroy_process_group()
