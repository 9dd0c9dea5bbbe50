"""Euclidean norms over all trained parameters, with the same bits however the parameters are divided among workers."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from mbgd.averaging.pieces import Piece, block_on, in_memory_order, with_strides

Gather = Callable[[Tensor], Sequence[Tensor]]
"""This worker's values → every worker's, by rank."""


class TotalNorm:
    """The norm of tensors like the parameters: of each block of elements, and then of these norms, in order.

    For parameters of one block each that is torch's `get_total_norm`.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._block = block_on(parameters[0].device)
        self._dtype = reduce(torch.promote_types, (p.dtype.to_real() for p in parameters))
        self._nothing = torch.zeros((), device=parameters[0].device)
        self._strides = [torch.empty_like(p, device="meta").stride() for p in parameters]
        self._counts = [len(range(0, max(p.numel(), 1), self._block)) for p in parameters]

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Shape (), in the parameters' widest dtype. tensors: one for each parameter; None: it counts as zeros."""
        together = zip(tensors, self._strides, strict=True)
        blocks = [None if one is None else self._blocks(one, strides) for one, strides in together]
        norms = _norms(blocks, self._counts, self._nothing)
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(self._dtype) for norm in norms]))
        return total

    def _blocks(self, tensor: Tensor, strides: tuple[int, ...]) -> Sequence[Tensor]:
        return torch.split(in_memory_order(with_strides(tensor, strides)), self._block)


class NormOfPieces:
    """The same norm where each worker has pieces of the parameters; the workers exchange the norms of their blocks."""

    def __init__(
        self, parameters: Sequence[Tensor], of_workers: Sequence[Sequence[Piece]], rank: int, gather: Gather
    ) -> None:
        """of_workers: every worker's pieces."""
        self._gather, self._device = gather, parameters[0].device
        self._block = block_on(self._device)
        self._dtype = reduce(torch.promote_types, (p.dtype.to_real() for p in parameters))
        counts = [[len(range(one.start, max(one.stop, 1), self._block)) for one in pieces] for pieces in of_workers]
        self._counts = counts[rank]
        self._most = max(map(sum, counts))
        order = []
        for of_rank, (pieces, of_worker) in enumerate(zip(of_workers, counts, strict=True)):
            first = of_rank * self._most
            for piece, count in zip(pieces, of_worker, strict=True):
                order += [(piece.parameter, piece.start, first + at) for at in range(count)]
                first += count
        self._order = torch.tensor([at for *_, at in sorted(order)], device=self._device)
        self._nothing = torch.zeros((), device=self._device)

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Shape (); tensors: one for each of this worker's pieces. Every worker calls this."""
        blocks = [None if one is None else self._blocks(one) for one in tensors]
        mine = torch.zeros(self._most, dtype=torch.float64, device=self._device)
        if norms := _norms(blocks, self._counts, self._nothing):
            mine[: len(norms)] = torch.stack([norm.double() for norm in norms])
        norms_of_all = torch.cat(list(self._gather(mine)))[self._order]
        total: Tensor = torch.linalg.vector_norm(norms_of_all.to(self._dtype))
        return total

    def _blocks(self, piece: Tensor) -> Sequence[Tensor]:
        return torch.split(in_memory_order(piece), self._block)


def _norms(blocks: Sequence[Sequence[Tensor] | None], counts: Sequence[int], nothing: Tensor) -> list[Tensor]:
    """The norm of each block; `nothing` for every block of a tensor that is None. counts: of blocks."""
    there = [block for of_one in blocks if of_one is not None for block in of_one]
    norms = iter(torch._foreach_norm(there) if there else [])
    pairs = zip(blocks, counts, strict=True)
    return [nothing if of_one is None else next(norms) for of_one, count in pairs for _ in range(count)]
