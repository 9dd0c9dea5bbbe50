"""All workers' encodings of a minibatch, in its order, on every worker."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mbgd.batches.loader import Shard
from mbgd.batches.plan import Minibatch, Plan, cut
from mbgd.errors import UsageError
from mbgd.workers.group import Workers
from mbgd.workers.messages import bytes_of

Kind = tuple[tuple[int, ...], str]
"""Shape without the first dimension, and dtype."""


class Gathering:
    """Gathers rows of uneven numbers: a worker without a shard gives none."""

    def __init__(self, workers: Workers, plan: Plan) -> None:
        self._workers, self._plan = workers, plan
        self._kinds: list[Kind] | None = None
        """Of the encodings, the same on every worker and in every step."""

    def __call__(self, shard: Shard, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Each encoding of the whole minibatch, without a graph; floating ones are leaves that require a gradient.

        parts: the encodings of each of this worker's micro-batches. UsageError where their shapes or dtypes differ.
        """
        self._check([[_kind(one) for one in of_micro_batch] for of_micro_batch in parts])
        mine = [torch.cat([part.detach() for part in of_one]) for of_one in zip(*parts, strict=True)]
        if shard.micro_batches[0].micro_batch.is_stand_in:
            mine = [one[:0] for one in mine]
        whole = mine if self._workers.num_workers == 1 else self._exchange(mine, self._num_rows(shard.minibatch))
        return [one.requires_grad_(one.is_floating_point() or one.is_complex()) for one in whole]

    def _check(self, of_parts: list[list[Kind]]) -> None:
        if self._kinds is None:
            mine = [[list(shape), dtype] for shape, dtype in of_parts[0]]
            of_workers = self._workers.gather_values(mine)
            if others := [rank for rank, kinds in enumerate(of_workers) if kinds != of_workers[0]]:
                raise UsageError(_describe(_kinds(of_workers[others[0]]), _kinds(of_workers[0]), f"worker {others[0]}"))
            self._kinds = of_parts[0]
        if wrong := [kinds for kinds in of_parts if kinds != self._kinds]:
            raise UsageError(_describe(wrong[0], self._kinds, "one micro-batch"))

    def _num_rows(self, minibatch: Minibatch) -> list[int]:
        """By rank."""
        size, num_workers = minibatch.size, self._workers.num_workers
        num_parts = self._plan.num_micro_batches(size)
        edges = [cut(size, num_parts, cut(num_parts, num_workers, rank)) for rank in range(num_workers + 1)]
        return [stop - start for start, stop in pairwise(edges)]

    def _exchange(self, mine: Sequence[Tensor], num_rows: Sequence[int]) -> list[Tensor]:
        gathered = []
        for one in mine:
            # An all-gather needs equal sizes, and bytes come through for any dtype.
            padded = one.new_zeros((max(num_rows), *one.shape[1:]))
            padded[: len(one)] = one
            of_workers = self._workers.all_gather(bytes_of(padded))
            rows = [
                values.view(one.dtype).view(padded.shape)[:number]
                for values, number in zip(of_workers, num_rows, strict=True)
            ]
            gathered.append(torch.cat(rows))
        return gathered


def _kind(encoding: Tensor) -> Kind:
    return tuple(encoding.shape[1:]), str(encoding.dtype).removeprefix("torch.")


def _kinds(values: Sequence[Sequence[object]]) -> list[Kind]:
    return [(tuple(shape), str(dtype)) for shape, dtype in values]  # type: ignore[arg-type]


def _describe(found: Sequence[Kind], known: Sequence[Kind], where: str) -> str:
    told = [
        ", ".join(f"{dtype} (N{''.join(f', {size}' for size in shape)})" for shape, dtype in kinds)
        for kinds in (found, known)
    ]
    return (
        f"the objective's encode returned {told[0]} for {where}, and {told[1]} for others. A minibatch's encodings are "
        "gathered over its micro-batches and workers, so only their first dimension may differ. Pad to a fixed length, "
        "or return fewer values per example."
    )
