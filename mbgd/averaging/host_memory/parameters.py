"""The parameters of the model, once per host, in memory that all workers map.

A piece of a parameter is written by its owner alone, between two barriers of the averaging; forwards run outside of
them. The model's parameters are a private mapping of the memory: what the model or a user writes to them stays in that
process, where `written_by_others` finds it. In memory mapped in common each worker would apply the same change again.
"""

import ctypes
import sys
from collections.abc import Mapping

from torch import Tensor, nn

from mbgd.averaging.host_memory.layout import Layout
from mbgd.averaging.host_memory.memory import HostMemory
from mbgd.averaging.pieces import Owned, Piece, cut_out, with_strides

_DONTNEED = 4
"""MADV_DONTNEED: forget this process's own copies of pages."""

if sys.platform == "linux":  # elsewhere there is no `HostMemory`
    _libc = ctypes.CDLL(None)
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class SharedParameters:
    """Parameters whose values all workers of a host share; each worker writes to its own pieces."""

    def __init__(
        self, by_name: Mapping[str, nn.Parameter], of_workers: list[list[Piece]], memory: HostMemory, rank: int
    ) -> None:
        """Moves the parameters there, which are alike on all workers. Raises CannotShareError, on all alike."""
        self._names, self._parameters, self._memory = list(by_name), list(by_name.values()), memory
        layout = Layout(self._parameters)
        self._all_pages, self._own_pages = memory.allocate_once(layout.num_bytes)
        self._shared, self._seen = layout.views(self._all_pages), layout.views(self._own_pages)
        self.owned = Owned(self._parameters, of_workers, self._shared, rank)
        self.adopt()

    def adopt(self) -> None:
        """Make the values that the parameters have now, alike on all workers, those of the shared memory."""
        for piece in self.owned.pieces:
            shared = self._shared[piece.parameter]
            value = with_strides(self._parameters[piece.parameter].detach(), shared.stride())
            cut_out(shared, piece).copy_(cut_out(value, piece))
        self._memory.barrier()  # all have written
        show_shared(self._own_pages)
        for parameter, seen in zip(self._parameters, self._seen, strict=True):
            parameter.data = seen

    def allocate(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """`HostMemory.allocate_once`; raises CannotShareError, on all alike."""
        return self._memory.allocate_once(num_bytes)

    def spread(self) -> None:
        """Wait until all owners have updated their pieces, which then are there."""
        self._memory.barrier()

    def written_by_others(self) -> list[str]:
        """Names of parameters that something other than their owners' optimizers has written in this process."""
        together = list(zip(self._names, self._parameters, self._seen, self._shared, strict=True))
        moved = [name for name, parameter, seen, _ in together if parameter.data_ptr() != seen.data_ptr()]
        if _same_bytes(self._own_pages, self._all_pages):
            return moved
        return moved + [name for name, _, seen, shared in together if not _same_bytes(seen, shared)]


def show_shared(own: Tensor) -> None:
    """Let the second mapping of `HostMemory.allocate_once` show what is shared, also where this process wrote to it."""
    _libc.madvise(own.data_ptr(), own.nbytes, _DONTNEED)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, without gaps in memory, hold the same bytes."""
    return not _libc.memcmp(one.data_ptr(), other.data_ptr(), one.nbytes)
