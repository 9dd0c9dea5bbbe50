"""The user's own tensors, from one .npz or .safetensors file."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mbgd.data.in_memory import InMemory
from mbgd.errors import UsageError

PREFIXES = {"train": "", "evaluation": "eval_"}


def tensors(path: str, split: str) -> InMemory | None:
    """The examples of a split, "train" or "evaluation", from a file that holds `inputs` and `targets`.

    `eval_inputs` and `eval_targets` are for evaluation; None if the file has neither. Floating values and integer
    inputs keep their dtype, integer targets become int64. UsageError if the file is missing, unreadable or incomplete,
    or holds pickled objects, which are never loaded.
    """
    prefix = PREFIXES[split]
    arrays = _read(Path(path).expanduser())
    names = [f"{prefix}inputs", f"{prefix}targets"]
    missing = [name for name in names if name not in arrays]
    if split == "evaluation" and len(missing) == 2:
        return None
    if missing:
        raise UsageError(
            f"{path} has no {' and no '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}."
        )
    inputs, targets = (arrays[name] for name in names)
    for name, values in zip(names, (inputs, targets), strict=True):
        if values.is_floating_point() and not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise UsageError(f"{name} in {path} holds {bad} values that are nan or infinite; all must be finite.")
    try:
        return InMemory(inputs, targets if targets.is_floating_point() else targets.to(torch.int64))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"data.path={path}: there is no such file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is not a readable .safetensors file: {error}") from error
    if path.suffix != ".npz":
        raise UsageError(f"data.path={path} ends in {path.suffix or 'nothing'}; it must be .npz or .safetensors.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} is not a readable .npz file of numbers: {error}. Objects and pickles are refused, since loading "
            "them could run code: save plain arrays with numpy.savez(path, inputs=…, targets=…)."
        ) from error
