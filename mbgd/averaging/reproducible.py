"""Averaging whose result has the same bits on any number of workers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from mbgd.averaging.bucket_exchange import BucketExchange, most_nodes, nodes_of_workers
from mbgd.averaging.ddp import check_exchanged, completed, used_anywhere, wrap
from mbgd.averaging.gradients import Gradients, add_gradients, add_into_right, flat, of_bucket, separate
from mbgd.averaging.host_memory.exchange import Exchange, check_moved_on
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.host_memory.parameters import SharedParameters
from mbgd.averaging.host_memory.rows import MOVED_ON, NO_NOTE, Row
from mbgd.averaging.norms import MicroBatchNorms
from mbgd.averaging.pieces import Owned, OwnedParameters, Piece, in_memory_order
from mbgd.averaging.sent_parameters import SentParameters
from mbgd.averaging.tree import Counter, fold
from mbgd.batches.plan import MicroBatch, Plan
from mbgd.errors import UsageError
from mbgd.task.trained import Trained
from mbgd.workers.group import Workers


class Reproducible:
    """Micro-batch gradients are the leaves of the tree in `tree.py`.

    Each worker folds its own leaves into O(log K) nodes. A communication hook of DDP folds in the last leaf, bucket by
    bucket, and starts sending slices of the nodes while the backward goes on. In the end each worker has folded one
    slice to the root and sends it to all, both in the rounds of `rounds.py`. Addition is elementwise, so slices and
    buckets do not change the bits. CPU workers of one host do the same in shared memory, without DDP.
    """

    def __init__(
        self,
        task: nn.Module,
        trained: Trained,
        workers: Workers,
        plan: Plan,
        memory: HostMemory | None = None,
        *,
        find_unused_parameters: bool,
        note: str = "",
    ) -> None:
        """memory: shared by all workers; None: exchange gradients by the process group. note: text `describe` appends.

        Raises CannotShareError, on all workers alike, if there is too little memory to share.
        """
        self._task, self._trained, self._workers, self._memory, self._note = task, trained, workers, memory, note
        self._most_nodes = most_nodes(plan) if memory is not None else 0
        # A parameter without a gradient counts as zeros, and adding zeros turns −0 into 0. So that the bits do not
        # depend on where that happens, 0 is then added to every leaf.
        self._parameters_vary = find_unused_parameters
        self._ddp: DistributedDataParallel | None = None
        self._norms: MicroBatchNorms | None = None
        self._in_memory: Exchange | None = None
        self._owned: Owned | None = None
        self._counter = Counter[Gradients](add_gradients)
        self._last = MicroBatch(0, 1, 0, 0)
        self._exchanges: dict[int, BucketExchange] = {}
        self._has_moved_on = False
        """The parameters that require a gradient are no longer those that DDP was built for."""
        self._sent: list[BucketExchange] = []
        self._of_sums: dict[int, BucketExchange] = {}
        """Of the sums of vectors, by their length."""
        self._exchanged = True
        trained.moved_on()
        self._prepare()

    def _prepare(self) -> None:
        """Set up the exchange for the parameters that require a gradient now."""
        self._parameters = self._trained.with_gradient()
        if self._memory is not None:
            self._make_exchange(self._memory)
        elif self._workers.num_workers > 1:
            self._ddp = None  # so that the old DDP's hooks are gone first
            self._exchanges.clear()
            self._ddp = wrap(self._task, self._trained, self._send_bucket, find_unused_parameters=self._parameters_vary)

    def _make_exchange(self, memory: HostMemory) -> None:
        self._in_memory = Exchange(self._parameters, self._most_nodes, memory, rank=self._workers.rank)
        if self._owned is not None:
            self._in_memory.own(self._owned)

    def start(self, norms: MicroBatchNorms | None = None) -> None:
        self._norms = norms
        if self._ddp is not None and self._trained.moved_on():
            self._prepare()

    def forward(self, batch: Any, num_examples: int) -> Any:
        forward = self._task.forward if self._ddp is None else self._ddp
        return forward(batch, num_examples)

    @contextmanager
    def micro_batch(self, micro_batch: MicroBatch, *, is_last: bool) -> Iterator[None]:
        self._last = micro_batch
        if self._ddp is None:
            yield
        elif is_last:
            if self._parameters_vary:
                self._zero_gradients_of_used_parameters()
            self._exchanged = False
            yield
            check_exchanged(self._trained, self._exchanged)
            if self._trained.moved_on():
                self._has_moved_on = True
                wrapped = set(self._parameters)
                self._send_late([p for p in self._trained.with_gradient() if p not in wrapped])
            return  # `_send_bucket` has the gradients
        else:
            with self._ddp.no_sync():
                yield
        gradients = self._take_gradients()
        if self._norms is not None:
            self._norms.take(micro_batch.number, gradients)
        if not micro_batch.is_stand_in:
            self._counter.push(micro_batch.number, gradients)

    def _zero_gradients_of_used_parameters(self) -> None:
        """DDP needs a gradient for every parameter used in an earlier micro-batch, even if the last does not use it."""
        for _, gradients in self._counter.nodes:
            for parameter in gradients:
                parameter.grad = torch.zeros_like(parameter)

    def _take_gradients(self) -> Gradients:
        """Take the gradients of one micro-batch off the parameters, so that the next does not accumulate into them."""
        gradients: Gradients = {p: p.grad for p in self._trained.parameters if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        if self._parameters_vary:
            return {parameter: gradient + 0.0 for parameter, gradient in gradients.items()}
        return gradients

    def _send_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        if self._parameters_vary:
            buffer += 0.0
        self._send(bucket.index(), buffer, of_bucket(bucket))
        self._exchanged = bucket.is_last()
        return completed(buffer)

    def _send_late(self, parameters: Sequence[Tensor]) -> None:
        """Send the gradients of parameters that began to require one in a forward, and so are in no bucket."""
        used = used_anywhere(parameters, self._workers)
        late = [parameter for parameter, is_used in zip(parameters, used, strict=True) if is_used]
        for index, parameter in enumerate(late):
            parameter.grad = gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._send(-1 - index, in_memory_order(gradient), {parameter: gradient})

    def _send(self, index: int, buffer: Tensor, gradients: Gradients) -> None:
        """Start sending the nodes of these gradients, those of the last micro-batch, which are views of `buffer`."""
        if self._norms is not None:
            self._norms.take(self._last.number, gradients)
        counter = Counter[Gradients](add_into_right)
        counter.nodes = list(self._counter.nodes)
        if not self._last.is_stand_in:
            # Folded into the bucket itself: the gradients are its views.
            counter.push(self._last.number, gradients)
        nodes: list[Tensor] = [flat(of_node, gradients) for _, of_node in counter.nodes[:-1]]
        if counter.nodes:
            nodes.append(buffer)
        exchange = self._exchanges.get(index)
        if exchange is None or not exchange.fits(buffer, self._last.num_micro_batches):
            exchange = self._exchanges[index] = BucketExchange(buffer, self._last.num_micro_batches, self._workers)
        exchange.start(buffer, nodes)
        self._sent.append(exchange)

    def own(self, parameters: Mapping[str, nn.Parameter], of_workers: list[list[Piece]]) -> OwnedParameters:
        if self._memory is None or self._in_memory is None:
            sent = SentParameters(parameters, of_workers, self._workers)
            self._owned = sent.owned
            self._prepare()  # strides may have changed
            return sent
        shared = SharedParameters(parameters, of_workers, self._memory, self._workers.rank)
        self._owned = shared.owned
        self._in_memory.own(shared.owned)
        return shared

    @property
    def shares_memory(self) -> bool:
        return self._in_memory is not None

    def finish(self, note: int = NO_NOTE, *, whole: bool = True) -> list[int] | None:
        notes: list[int] | None = None
        if self._memory is not None:
            notes = self._add_up(note, whole=whole)
        elif self._ddp is None:
            for p, gradient in fold(dict(self._counter.nodes), self._last.num_micro_batches, add_gradients).items():
                p.grad = gradient
            self._trained.moved_on()
            notes = [note]
        while self._sent:  # all have the same number of rounds
            self._sent = [exchange for exchange in self._sent if exchange.advance()]
        if self._memory is None:
            separate(self._trained.parameters)
        self._counter.nodes.clear()
        if self._has_moved_on:
            self._has_moved_on = False
            self._prepare()
        if self._in_memory is None and self._owned is not None:
            self._owned.take_gradients(whole=whole)
        return notes

    def _add_up(self, note: int, *, whole: bool) -> list[int]:
        rows = [[gradients.get(p) for p in self._parameters] for _, gradients in self._counter.nodes]
        has_moved_on = self._trained.moved_on()
        notes, everywhere = self._exchange(rows, MOVED_ON if has_moved_on else note, whole=whole)
        if MOVED_ON in notes:
            check_moved_on(notes)
            self._prepare()
            return self._add_up(note, whole=whole)
        if not everywhere and not self._parameters_vary:
            raise UsageError(
                "some parameters took part in this step's loss in some micro-batches only, but all did in the first "
                "step. Set averaging.find_unused_parameters=true: then they may differ from step to step."
            )
        return notes

    def _exchange(self, rows: Sequence[Row], note: int, *, whole: bool) -> tuple[list[int], bool]:
        """Every worker's note by rank, and whether all rows had the same gradients."""
        assert self._in_memory is not None
        num_leaves = self._last.num_micro_batches
        nodes = nodes_of_workers(num_leaves, self._workers.num_workers)
        order = [node for held in nodes for node in held]
        notes = self._in_memory(
            rows,
            [len(held) for held in nodes],
            lambda values: fold(dict(zip(order, values, strict=True)), num_leaves, Tensor.add_),
            note,
            whole=whole,
        )
        return notes, self._in_memory.everywhere

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        if self._in_messages:
            exchange, total = self._start_messages(leaves, num_leaves, num_values)
            while exchange.advance():
                pass
            return total
        mine = self._rows(leaves, num_leaves, num_values)
        return self._root([mine] if self._workers.num_workers == 1 else self.gather(mine), num_leaves)

    def start_sum(
        self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int
    ) -> Callable[[], Tensor]:
        if self._in_messages:
            exchange, total = self._start_messages(leaves, num_leaves, num_values)
            self._sent.append(exchange)
            return lambda: total
        mine = self._rows(leaves, num_leaves, num_values)
        of_workers = [mine] if self._memory is None else self._memory.put(mine)
        return lambda: self._root(of_workers, num_leaves)

    @property
    def _in_messages(self) -> bool:
        return self._memory is None and self._workers.num_workers > 1

    def _start_messages(
        self, leaves: Sequence[tuple[int, Tensor]], num_leaves: int, num_values: int
    ) -> tuple[BucketExchange, Tensor]:
        """The exchange under way, as of a bucket, and the memory for the sum."""
        counter = Counter[Tensor](torch.add)
        for leaf, values in leaves:
            counter.push(leaf, values)
        total = torch.zeros(num_values, dtype=torch.float64, device=self._workers.device)
        exchange = self._of_sums.get(num_values)
        if exchange is None or not exchange.fits(total, num_leaves):
            exchange = self._of_sums[num_values] = BucketExchange(total, num_leaves, self._workers)
        exchange.start(total, [values.clone() for _, values in counter.nodes])  # the exchange adds to them
        return exchange, total

    def _rows(self, leaves: Sequence[tuple[int, Tensor]], num_leaves: int, num_values: int) -> Tensor:
        """This worker's nodes of the sum, one a row; as many rows on every worker."""
        counter = Counter[Tensor](torch.add)
        for leaf, values in leaves:
            counter.push(leaf, values)
        most = max(len(held) for held in nodes_of_workers(num_leaves, self._workers.num_workers))
        mine = torch.zeros(most, num_values, dtype=torch.float64, device=self._workers.device)
        for row, (_, values) in zip(mine, counter.nodes, strict=False):
            row.copy_(values)
        return mine

    def _root(self, of_workers: Sequence[Tensor], num_leaves: int) -> Tensor:
        nodes = nodes_of_workers(num_leaves, self._workers.num_workers)
        pairs = zip(nodes, of_workers, strict=True)
        by_node = {node: row for held, rows in pairs for node, row in zip(held, rows, strict=False)}
        root: Tensor = fold(by_node, num_leaves, torch.add)
        return root.clone()

    def gather(self, values: Tensor) -> Sequence[Tensor]:
        return self._memory.all_gather(values) if self._memory is not None else self._workers.all_gather(values)

    def describe(self) -> str:
        if self._workers.num_workers == 1:
            return "reproducible, one worker"
        return f"reproducible over {'shared memory' if self._memory is not None else self._workers.backend}{self._note}"
