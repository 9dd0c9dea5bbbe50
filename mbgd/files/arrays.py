"""Arrays by name, written as a file that its suffix chooses."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from mbgd.errors import UsageError
from mbgd.files.atomic import replaced
from mbgd.text.escaping import plain

COUNTER = "example"
"""The first column of a .csv file."""


def _safetensors(path: Path, arrays: Mapping[str, Tensor]) -> None:
    save_file({name: array.contiguous() for name, array in arrays.items()}, path)


def _npz(path: Path, arrays: Mapping[str, Tensor]) -> None:
    with path.open("xb") as file:
        values: dict[str, Any] = {name: _numpy(array) for name, array in arrays.items()}
        np.savez(file, **values)


def _csv(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """One row per example; numbers have the digits that tell them from others of their dtype."""
    columns: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        one, values = name.removesuffix("s"), _numpy(array)
        if values.ndim == 1:
            columns[one] = values
        else:
            columns |= {f"{one}_{number}": values[:, number] for number in range(values.shape[1])}
    with path.open("x", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([COUNTER, *columns])
        for number, row in enumerate(zip(*columns.values(), strict=True)):
            writer.writerow([number, *map(str, row)])


def _numpy(array: Tensor) -> NDArray[Any]:
    """numpy has no bfloat16; float32 holds its values."""
    return (array.float() if array.dtype is torch.bfloat16 else array).numpy()


WRITERS: dict[str, Callable[[Path, Mapping[str, Tensor]], None]] = {
    ".safetensors": _safetensors,
    ".npz": _npz,
    ".csv": _csv,
}


def check_name(path: Path) -> None:
    """UsageError for a suffix that names no kind of file."""
    if path.suffix not in WRITERS:
        raise UsageError(f"{plain(path)} ends in {path.suffix or 'nothing'}; it must be {', '.join(WRITERS)}.")


def check_shapes(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """UsageError if the kind of file cannot hold arrays of these shapes."""
    large = [f"{name} {tuple(array.shape)}" for name, array in arrays.items() if array.dim() > 2]
    if path.suffix == ".csv" and large:
        raise UsageError(
            f"{plain(path)}: a .csv file has one row per example, and numbers or lists of numbers in it; "
            f"{', '.join(large)} have more dimensions. Use .npz or .safetensors."
        )


def write(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write the file whole, or leave what was there; OSError if that fails."""
    with replaced(path) as temporary:
        WRITERS[path.suffix](temporary, arrays)
