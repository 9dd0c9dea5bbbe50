"""The user's own tensors, from one .npz or .safetensors file or a folder of .npy files, once per host."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mbgd.batches.pieces import pieces
from mbgd.data.array_files import open_arrays
from mbgd.data.in_memory import InMemory
from mbgd.data.mapped_file import MappedFile
from mbgd.errors import UsageError

PREFIXES = {"train": "", "evaluation": "eval_"}


class Tensors(InMemory):
    """Examples in memory that the workers of a host share; integer targets are given as int64.

    One integer per example becomes int64 at once; larger targets, such as a class per pixel, become int64 per batch.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, files: Sequence[MappedFile]) -> None:
        """files: those that are mapped; reading from one that has been written to raises UsageError."""
        if not targets.is_floating_point():
            if targets.dim() < 2 or targets.dtype in (torch.uint16, torch.uint32, torch.uint64):  # no max() in torch
                targets = targets.to(torch.int64)
            elif targets.dtype is torch.bool:
                targets = targets.view(torch.uint8)
        super().__init__(inputs, targets)
        self._files = files

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self._check()
        return _with_int64(*super().__getitem__(index))

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at these indices, copied; `indices` is int64, shape (N,)."""
        self._check()
        return _with_int64(*super().gather(indices))

    def _check(self) -> None:
        for file in self._files:
            file.check()


def _with_int64(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, targets if targets.is_floating_point() else targets.to(torch.int64)


def tensors(path: str, split: str) -> Tensors | None:
    """The examples of a split, "train" or "evaluation", from a file that holds `inputs` and `targets`.

    `eval_inputs` and `eval_targets` are for evaluation; None if the file has neither. A .safetensors file, or a folder
    of .npy files, is memory-mapped; an array of an .npz file is unpacked once per host. Floating values and integer
    inputs keep their dtype, integer targets are given as int64. UsageError if the file is missing, unreadable or
    incomplete, or holds pickled objects, which are never loaded.
    """
    prefix = PREFIXES[split]
    stored = open_arrays(Path(path).expanduser())
    names = [f"{prefix}inputs", f"{prefix}targets"]
    missing = [name for name in names if name not in stored.names]
    if split == "evaluation" and len(missing) == 2:
        return None
    if missing:
        raise UsageError(
            f"{path} has no {' and no '.join(missing)}; it holds {', '.join(sorted(stored.names)) or 'nothing'}."
        )
    inputs, targets = (stored.read(name) for name in names)
    for name, values in zip(names, (inputs, targets), strict=True):
        if values.is_floating_point() and (bad := sum(int((~piece.isfinite()).sum()) for piece in pieces(values))):
            raise UsageError(f"{name} in {path} holds {bad} values that are nan or infinite; all must be finite.")
    try:
        return Tensors(inputs, targets, stored.files)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
