"""The state of the pieces where workers share no memory: each worker has its own, and they meet to put it together."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mbgd.averaging.pieces import Owned
from mbgd.checkpoints.keeper import Keeper
from mbgd.checkpoints.together import TakenTogether
from mbgd.errors import UsageError
from mbgd.files.memory import available_bytes
from mbgd.step.pieces_state import PiecesState, lacking
from mbgd.step.whole_state import WholeState, own_parts
from mbgd.workers.group import Workers

CHUNK_BYTES = 2**24
"""Bytes that are sent at once: many small tensors together, large ones in parts."""


class ScatteredState(PiecesState):
    """Keeps the state of its own pieces alone, 1/W of the whole.

    The whole is put together in memory for a short time, by all workers at once: for a checkpoint on those that take
    one, and at the end of training on all.
    """

    def __init__(self, optimizer: Optimizer, owned: Owned, workers: Workers) -> None:
        super().__init__(optimizer, owned, workers)
        self._is_here = False
        """Whether `whole` has the state of now."""
        self._why_not = ""

    @property
    def is_everywhere(self) -> bool:
        return not self.holds_pieces

    def problems(self, find: Callable[[], list[str]]) -> list[str]:
        """Each worker looks at its own pieces."""
        with self._of_own_pieces():
            found = find()
        return list(dict.fromkeys(one for of_worker in self._workers.gather_values(found) for one in of_worker))

    def together(self, checkpoints: Keeper) -> Keeper:
        return TakenTogether(checkpoints, self._workers, self)

    def settle(self) -> None:
        pass

    def replace(self, restore: Callable[[], None]) -> None:
        self.hold()
        self._is_here = True
        try:
            super().replace(restore)
        finally:
            self.drop()

    def release(self) -> None:
        """Where the whole state has no room on each worker, the optimizer keeps its pieces, and a warning says so."""
        self.gather(range(self._workers.num_workers), to_host=False)
        if self._is_here:
            super().release()
        elif self._workers.is_main:
            print(f"warning: after training the optimizer holds pieces of the parameters: {self._why_not}", flush=True)
        self.drop()

    def gather(self, takers: Collection[int], *, to_host: bool = True) -> None:
        """Put the whole state together on the workers `takers`, until `drop`; every worker calls this.

        to_host: in the host's memory, otherwise where the optimizer keeps it. A taker on which it is not whole
        afterwards says why when it is read.
        """
        if not self.holds_pieces:
            return
        mine, tensors, of_workers = self._agree_on_entries()
        is_taker, whole = self._workers.rank in takers, WholeState(of_workers, self._owned)
        if is_taker and not self._why_not:
            self._why_not = self._allocate(whole, len(takers), to_host=to_host)
        reasons = [why for why in self._workers.gather_values(self._why_not) if why]
        if reasons:
            self._why_not = reasons[0] if is_taker else ""
            return
        outgoing = list(own_parts(mine, tensors))
        incoming: list[list[Tensor]] = [whole.places(rank) if is_taker else [] for rank in range(len(of_workers))]
        self._exchange(outgoing, incoming, takers)
        if is_taker:
            self.whole.state = defaultdict(dict, whole.state())
            self._is_here = True

    def drop(self) -> None:
        """Forget the whole state."""
        self._is_here, self._why_not = False, ""
        self.whole.state.clear()

    def _read_pieces(self) -> None:
        if self._why_not:
            raise UsageError(f"the optimizer's state could not be put together: {self._why_not}")
        if not self._is_here:
            raise UsageError(
                "the optimizer's state lies in pieces on all workers (sharding=optimizer, without shared memory), and "
                "one worker cannot read it alone. It is whole in every checkpoint and after Trainer.fit; "
                "sharding=none keeps it whole on each worker."
            )

    def _place(self) -> None:
        pass  # it stays where it is

    @contextmanager
    def _of_own_pieces(self) -> Iterator[None]:
        """In this context `whole` has the state of this worker's pieces, as if that were the whole."""
        for piece, tensor in zip(self._owned.pieces, self._owned.tensors, strict=True):
            if (state := self._optimizer.state.get(tensor)) is not None:
                self.whole.state.setdefault(self._owned.parameters[piece.parameter], state)
        self._is_here = True
        try:
            yield
        finally:
            self.drop()

    def _agree_on_entries(self) -> tuple[list[Any], list[dict[str, Tensor]], list[list[Any]]]:
        """This worker's pieces with state, their tensors, and all workers' pieces; `_why_not` if one has failed."""
        mine: list[Any] = []
        tensors: list[dict[str, Tensor]] = []
        told: dict[str, Any]
        try:
            mine, tensors = self.described()
            told = {"entries": mine, "why": ""}
        except UsageError as error:
            told = {"entries": [], "why": str(error)}
        of_workers = self._workers.gather_values(told)
        entries = [one["entries"] for one in of_workers]
        self._why_not = next((one["why"] for one in of_workers if one["why"]), "") or lacking(entries, self._owned)
        return mine, tensors, entries

    def _allocate(self, whole: WholeState, num_takers: int, *, to_host: bool) -> str:
        """Make memory for the whole state; why that failed, or an empty text."""
        available, needed = available_bytes(), num_takers * whole.num_bytes(lambda kind: to_host or kind.is_on_host)
        if available is not None and needed > available:  # the takers may be on one host
            return f"the whole takes {needed // num_takers:,} bytes, and {available:,} bytes are available"
        host, device = torch.device("cpu"), self._workers.device
        try:
            whole.allocate(lambda kind: host if to_host or kind.is_on_host else device)
        except (MemoryError, RuntimeError) as error:
            return str(error).splitlines()[0]
        return ""

    def _exchange(self, outgoing: list[Tensor], incoming: list[list[Tensor]], takers: Collection[int]) -> None:
        """Send to each taker. In each round every worker sends to one and receives from one, so all links are busy."""
        rank, num_workers = self._workers.rank, self._workers.num_workers
        for place, vector in zip(incoming[rank], outgoing if rank in takers else [], strict=True):
            place.copy_(vector)
        for distance in range(1, num_workers):
            to, source = (rank + distance) % num_workers, (rank - distance) % num_workers
            sent = _in_chunks(outgoing) if to in takers else []
            for parts, places in zip_longest(sent, _in_chunks(incoming[source]), fillvalue=()):
                self._swap(parts, to, places, source)

    def _swap(self, parts: Sequence[Tensor], to: int, places: Sequence[Tensor], source: int) -> None:
        device, operations = self._workers.exchange_device, []
        if parts:
            operations.append(dist.P2POp(dist.isend, torch.cat([part.to(device) for part in parts]), to))
        received = torch.empty(sum(map(len, places)), dtype=torch.uint8, device=device)
        if places:
            operations.append(dist.P2POp(dist.irecv, received, source))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for place, part in zip(places, torch.split(received, [len(place) for place in places]), strict=True):
            place.copy_(part)


def _in_chunks(vectors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The vectors in chunks of at most `CHUNK_BYTES`, cut alike for vectors of the same lengths."""
    chunks: list[list[Tensor]] = []
    room = 0
    for vector in vectors:
        while len(vector):
            if not room:
                chunks.append([])
                room = CHUNK_BYTES
            part, vector = vector[:room], vector[room:]
            chunks[-1].append(part)
            room -= len(part)
    return chunks
