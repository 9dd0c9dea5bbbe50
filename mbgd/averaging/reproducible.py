"""Averaging whose result has the same bits on any number of workers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from mbgd.averaging.ddp import check_exchanged, wrap
from mbgd.averaging.tree import Counter, Node, fold, worker_nodes
from mbgd.objective import PerExample
from mbgd.plan import MicroBatch
from mbgd.task import Task
from mbgd.workers import Workers

Gradients = dict[Tensor, Tensor]
"""Parameter → gradient."""


class Reproducible:
    """Micro-batch gradients are the leaves of the tree of `tree.py`.

    Each worker folds its own leaves into O(log K) nodes. A communication hook of DDP folds in the last one, bucket by
    bucket, and starts to send every worker its slice of the nodes while the backward goes on. In the end each worker
    folds its slice to the root, and the slices are gathered on all. Adding is elementwise, so neither slices nor
    buckets matter to the bits.
    """

    def __init__(self, task: Task, workers: Workers, *, find_unused_parameters: bool) -> None:
        self._task, self._workers = task, workers
        # Where a parameter lacks a gradient, zeros are added for it, which makes −0 into 0; then every leaf must do so.
        self._parameters_vary = find_unused_parameters
        self._parameters = [p for p in task.parameters() if p.requires_grad]
        self._ddp: DistributedDataParallel | None = None
        if workers.num_workers > 1:
            self._ddp = wrap(task, self._send_bucket, find_unused_parameters=find_unused_parameters)
        self._counter = Counter[Gradients](_add_gradients)
        self._last = MicroBatch(0, 1, 0, 0)
        self._sent: list[_Exchange] = []

    def task(self, batch: Any, num_examples: int) -> PerExample:
        forward = self._task.forward if self._ddp is None else self._ddp
        terms: PerExample = forward(batch, num_examples)
        return terms

    @contextmanager
    def micro_batch(self, micro_batch: MicroBatch, *, is_last: bool) -> Iterator[None]:
        self._last = micro_batch
        if self._ddp is None:
            yield
        elif is_last:
            if self._parameters_vary:
                self._zero_gradients_of_used_parameters()
            yield
            check_exchanged(self._task, bool(self._sent) and self._sent[-1].is_last_bucket)
            return  # `_send_bucket` has the gradients
        else:
            with self._ddp.no_sync():
                yield
        self._counter.push(micro_batch.number, self._take_gradients())

    def _zero_gradients_of_used_parameters(self) -> None:
        """DDP wants a gradient of every parameter that took part in any micro-batch, if not in the last."""
        for _, gradients in self._counter.nodes:
            for parameter in gradients:
                parameter.grad = torch.zeros_like(parameter)

    def _take_gradients(self) -> Gradients:
        """The gradients of one micro-batch, which the next one then does not add to."""
        gradients: Gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        if self._parameters_vary:
            return {parameter: gradient + 0.0 for parameter, gradient in gradients.items()}
        return gradients

    def _send_bucket(self, state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        if self._parameters_vary:
            buffer += 0.0
        counter = Counter[Tensor](torch.add)
        for node, gradients in self._counter.nodes:
            counter.nodes.append((node, _flat(gradients, bucket.parameters())))
        if self._last.counts:
            counter.push(self._last.number, buffer)
        mine = [value for _, value in counter.nodes]
        self._sent.append(_Exchange(buffer, mine, self._last.of, self._workers, is_last_bucket=bucket.is_last()))
        # DDP may go on: `finish` puts the sum into the bucket, of which the parameters' gradients are views.
        ready: torch.futures.Future[Tensor] = torch.futures.Future()
        ready.set_result(buffer)
        return ready

    def finish(self) -> None:
        if self._ddp is None:
            total = fold(dict(self._counter.nodes), self._last.of, _add_gradients)
            for parameter, gradient in total.items():
                parameter.grad = gradient
        for exchange in self._sent:
            exchange.finish()
        self._sent.clear()
        self._counter.nodes.clear()

    def sum(self, leaves: Sequence[tuple[int, Tensor]], *, num_leaves: int, num_values: int) -> Tensor:
        counter = Counter[Tensor](torch.add)
        for leaf, values in leaves:
            counter.push(leaf, values)
        if self._workers.num_workers == 1:
            return fold(dict(counter.nodes), num_leaves, torch.add)
        nodes = nodes_of_workers(num_leaves, self._workers.num_workers)
        most = max(len(of_worker) for of_worker in nodes)
        mine = torch.zeros(most, num_values, dtype=torch.float64, device=self._workers.device)
        for row, (_, values) in zip(mine, counter.nodes, strict=False):
            row.copy_(values)
        gathered = mine.new_empty(len(nodes) * most, num_values)
        _all_gather(gathered, mine)
        by_node = {
            node: gathered[rank * most + row] for rank, held in enumerate(nodes) for row, node in enumerate(held)
        }
        return fold(by_node, num_leaves, torch.add)


class _Exchange:
    """The sum of one bucket over all workers' nodes, in the order of the tree; begun at once, ended by `finish`."""

    def __init__(
        self, buffer: Tensor, mine: list[Tensor], num_leaves: int, workers: Workers, *, is_last_bucket: bool
    ) -> None:
        """buffer: the bucket, which takes the sum; mine: what this worker's nodes hold of it, each of its shape."""
        self.is_last_bucket = is_last_bucket
        self._buffer, self._num_leaves = buffer, num_leaves
        self._nodes = nodes_of_workers(num_leaves, workers.num_workers)
        num_workers, self._slice = workers.num_workers, -(-len(buffer) // workers.num_workers)
        sent = buffer.new_zeros(len(mine), num_workers * self._slice)
        for row, values in zip(sent, mine, strict=True):
            row[: len(values)] = values
        # One slice of each of my nodes to every worker; from every worker, my slice of each of its nodes.
        self._sent = sent.view(len(mine), num_workers, self._slice).transpose(0, 1).contiguous()
        counts = [len(held) for held in self._nodes]
        self._received = buffer.new_empty(sum(counts), self._slice)
        self._work = dist.all_to_all_single(
            self._received,
            self._sent.view(-1, self._slice),
            output_split_sizes=counts,
            input_split_sizes=[len(mine)] * num_workers,
            async_op=True,
        )

    def finish(self) -> None:
        self._work.wait()
        nodes = dict(zip([node for held in self._nodes for node in held], self._received, strict=True))
        root = fold(nodes, self._num_leaves, Tensor.add_)
        gathered = root.new_empty(len(self._nodes) * self._slice)
        _all_gather(gathered, root)
        self._buffer.copy_(gathered[: len(self._buffer)])


# torch 2.13 renamed it.
_all_gather: Callable[[Tensor, Tensor], object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@lru_cache
def nodes_of_workers(num_leaves: int, num_workers: int) -> list[list[Node]]:
    """What each worker holds after its own leaves."""
    return [worker_nodes(num_leaves, num_workers, rank) for rank in range(num_workers)]


def _flat(gradients: Gradients, parameters: Sequence[Tensor]) -> Tensor:
    """The gradients in a bucket's layout; zeros for a parameter that has none."""
    return torch.cat([(gradients[p] if p in gradients else torch.zeros_like(p)).flatten() for p in parameters])


def _add_gradients(left: Gradients, right: Gradients) -> Gradients:
    """left + right, in left's memory; a parameter without a gradient on one side counts as zeros there."""
    both = [p for p in left if p in right]
    if both:
        torch._foreach_add_([left[p] for p in both], [right[p] for p in both])
    return right | left
