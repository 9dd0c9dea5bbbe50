"""Where tensors lie in a piece of shared memory."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind")

LINE_BYTES = 64
"""Each tensor is aligned to a cache line, which also suits the widest vector instructions."""
LINE_BYTES_ON_GPU = 512
"""As torch allocates memory there: kernels, and so bits, may depend on the alignment."""


class Layout:
    """Each parameter's place in a row of bytes; those of one dtype lie together."""

    def __init__(self, parameters: Sequence[Tensor], line_bytes: int = LINE_BYTES) -> None:
        self._parameters = parameters
        self.offsets = [0] * len(parameters)
        self.dtypes: list[tuple[torch.dtype, int, int]] = []
        """Each dtype with the byte range [start, stop) of its parameters."""
        self.num_bytes = 0
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            start = self.num_bytes
            for number, parameter in enumerate(parameters):
                if parameter.dtype == dtype:
                    self.offsets[number] = self.num_bytes
                    self.num_bytes += whole_lines(parameter.nbytes, line_bytes)
            self.dtypes.append((dtype, start, self.num_bytes))

    def views(self, row: Tensor) -> list[Tensor]:
        """Views of a row's bytes, one for each parameter, with the parameter's strides."""
        views = []
        for parameter, offset in zip(self._parameters, self.offsets, strict=True):
            flat = row[offset : offset + parameter.nbytes].view(parameter.dtype)
            views.append(flat.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride()))
        return views


def whole_lines(num_bytes: int, line_bytes: int = LINE_BYTES) -> int:
    """The number of bytes, rounded up to whole cache lines."""
    return -(-num_bytes // line_bytes) * line_bytes


def joined(ranges: Iterable[tuple[Kind, int, int]]) -> list[tuple[Kind, int, int]]:
    """Ranges (kind, begin, end) of one kind that follow each other as one, in the order of memory."""
    found: list[tuple[Kind, int, int]] = []
    for kind, begin, end in sorted(ranges, key=lambda one: one[1]):
        if found and found[-1][0] == kind and found[-1][2] == begin:
            found[-1] = (kind, found[-1][1], end)
        else:
            found.append((kind, begin, end))
    return found
