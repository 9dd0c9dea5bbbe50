"""Which pieces of the parameters each worker updates: ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054).

Every averaging leaves each worker with the sum of a slice of the gradient. The worker that sums a slice also updates
it, so that each keeps the optimizer's state of its own pieces alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 2**14
"""Parameters are cut between blocks of this many elements alone, which are whole cache lines and vectors: kernels then
compute each element as they do on whole parameters. Norms are summed block by block."""
BLOCK_ON_GPU = 2**20
"""There, one call for each small block would take longer than its elements."""


def block_on(device: torch.device) -> int:
    """Number of elements of a block on such a device."""
    return BLOCK_ON_GPU if device.type == "cuda" else BLOCK


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a parameter, in the order of its memory."""

    parameter: int
    """Its number among the trained parameters."""
    start: int
    stop: int


def cut_in_blocks(parameters: Sequence[Tensor], num_workers: int) -> list[list[Piece]]:
    """Each worker's pieces by rank: blocks in order, cut so that all workers have about as many bytes.

    One element is no block of its own: as a piece it could not be told from a count of steps of shape (1,).
    """
    length = block_on(parameters[0].device)
    blocks = [
        (Piece(number, start, stop if p.numel() - (stop := start + length) > 1 else p.numel()), p.element_size())
        for number, p in enumerate(parameters)
        for start in range(0, max(p.numel() - 1, 1), length)
    ]
    total = max(sum((block.stop - block.start) * size for block, size in blocks), 1)
    of_workers: list[list[Piece]] = [[] for _ in range(num_workers)]
    before = 0
    for block, size in blocks:
        num_bytes = (block.stop - block.start) * size
        middle = before + num_bytes / 2
        _append(of_workers[min(int(middle * num_workers / total), num_workers - 1)], block)
        before += num_bytes
    return of_workers


def _append(pieces: list[Piece], block: Piece) -> None:
    last = pieces[-1] if pieces else None
    if last is not None and last.parameter == block.parameter and last.stop == block.start:
        pieces[-1] = Piece(last.parameter, last.start, block.stop)
    else:
        pieces.append(block)


def cut_by_parameters(parameters: Sequence[Tensor], costs: Sequence[int], num_workers: int) -> list[list[Piece]]:
    """Each worker's whole parameters by rank: the costliest first, to the worker with the least work."""
    of_workers: list[list[Piece]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for number in sorted(range(len(parameters)), key=lambda number: -costs[number]):
        rank = loads.index(min(loads))
        loads[rank] += costs[number]
        of_workers[rank].append(Piece(number, 0, parameters[number].numel()))
    return [sorted(pieces, key=lambda piece: piece.parameter) for pieces in of_workers]


class Owned:
    """This worker's pieces as tensors that its optimizer updates in place of the parameters."""

    def __init__(
        self, parameters: Sequence[Tensor], of_workers: Sequence[Sequence[Piece]], memory: Sequence[Tensor], rank: int
    ) -> None:
        """parameters: all trained ones. memory: tensors like them, whose pieces the optimizer writes to."""
        self.parameters, self.of_workers, self.pieces = list(parameters), of_workers, of_workers[rank]
        self.tensors = [cut_out(memory[one.parameter], one).detach() for one in self.pieces]
        """Leaf tensors: whole parameters in their shape, parts of one as vectors."""
        self.follow_flags()

    def follow_flags(self) -> None:
        """Let each piece require a gradient as its parameter does now."""
        for piece, tensor in zip(self.pieces, self.tensors, strict=True):
            requires_grad = self.parameters[piece.parameter].requires_grad
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)

    def take_gradients(self, *, whole: bool = True) -> None:
        """Give each piece its part of the parameter's gradient. whole=False: the parameters then have none."""
        self.follow_flags()
        for piece, tensor in zip(self.pieces, self.tensors, strict=True):
            parameter = self.parameters[piece.parameter]
            gradient = parameter.grad
            tensor.grad = None if gradient is None else cut_out(with_strides(gradient, parameter.stride()), piece)
        for parameter in () if whole else self.parameters:
            parameter.grad = None


class OwnedParameters(Protocol):
    """The parameters where each worker updates its own pieces of them, and how it gets the others'."""

    owned: Owned

    @property
    def allocate(self) -> Callable[[int], tuple[Tensor, Tensor]] | None:
        """Gives N bytes of zeroed memory that all workers share, mapped twice as by `HostMemory.allocate_once`; None
        where they share none."""

    def adopt(self) -> None:
        """Take over the values that the parameters have now, alike on all workers."""

    def spread(self) -> None:
        """Let all workers have all pieces, each of which its owner has updated."""

    def written_by_others(self) -> list[str]:
        """Names of parameters that something other than their owners' optimizers has written in this process, as far
        as it would be lost."""


def cut_out(tensor: Tensor, piece: Piece) -> Tensor:
    """A view of the piece: a whole tensor as it is, otherwise a vector. The tensor has no gaps in memory."""
    if piece.stop - piece.start == tensor.numel():
        return tensor
    return in_memory_order(tensor)[piece.start : piece.stop]


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, or a copy of it that lies in memory in another order."""
    return tensor if tensor.stride() == strides else tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements as a vector, a view; the tensor has no gaps in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
