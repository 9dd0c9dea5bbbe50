"""Arrays by name from files, once per host: .safetensors and .npy files are mapped, arrays of .npz files unpacked."""

import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mbgd.data.host_copy import host_copy
from mbgd.data.mapped_file import Bytes, MappedFile
from mbgd.errors import UsageError
from mbgd.files.reading import open_regular, parse_json

COPIED_BYTES = 2**20
UNREADABLE = (OSError, ValueError, EOFError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Raised for .npz and .npy files that are damaged, encrypted, or hold something else than numbers."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in .safetensors files."""


class Arrays(NamedTuple):
    """What a file or folder holds."""

    names: Sequence[str]
    read: Callable[[str], Tensor]
    files: list[MappedFile]
    """Those that are mapped; reading an array may add one."""


def open_arrays(path: Path) -> Arrays:
    """UsageError if the path is missing or unreadable; reading an array raises it, too."""
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UsageError(f"data.path={path}: there is no such file.")
    if path.suffix not in (".npz", ".safetensors"):
        raise UsageError(
            f"data.path={path} ends in {path.suffix or 'nothing'}; it must be .npz or .safetensors, or a folder of "
            "inputs.npy, targets.npy and, for evaluation, eval_inputs.npy, eval_targets.npy."
        )
    return (_safetensors if path.suffix == ".safetensors" else _npz)(path)


def _safetensors(path: Path) -> Arrays:
    try:
        mapped = MappedFile(path)
        with safe_open(path, "pt"):  # checks the header and the file's length
            pass
        start = 8 + int.from_bytes(mapped.bytes[:8].tobytes(), "little")
        header = parse_json(mapped.bytes[8:start].tobytes())
        header.pop("__metadata__", None)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable .safetensors file: {error}") from error

    def read(name: str) -> Tensor:
        kind, shape, (first, stop) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
        if kind not in DTYPES:
            raise UsageError(f"{name} in {path} has dtype {kind}; it must be one of {', '.join(DTYPES)}.")
        values = _aligned(mapped.bytes[start + first : start + stop], DTYPES[kind].itemsize)
        return torch.from_numpy(values).view(DTYPES[kind]).reshape(shape)

    return Arrays(list(header), read, [mapped])


def _folder(path: Path) -> Arrays:
    files: list[MappedFile] = []

    def read(name: str) -> Tensor:
        file = path / f"{name}.npy"
        with _explained(file, ".npy"):
            mapped = MappedFile(file)
            array = _Array.described_in(BytesIO(mapped.bytes[:COPIED_BYTES].tobytes()))
            array.check_bytes(len(mapped.bytes))
            files.append(mapped)
            return array.of(mapped.bytes[array.start :])

    return Arrays([file.stem for file in path.glob("*.npy")], read, files)


def _npz(path: Path) -> Arrays:
    def read(name: str) -> Tensor:
        with _explained(path, ".npz"), open_regular(path.resolve()) as file, zipfile.ZipFile(file) as archive:
            member = archive.getinfo(members[name])
            with archive.open(member) as stream:
                array = _Array.described_in(stream)
            array.check_bytes(member.file_size)

            def content() -> Iterator[bytes]:
                with _explained(path, ".npz"), archive.open(member) as stream:
                    stream.read(array.start)
                    while piece := stream.read(COPIED_BYTES):  # at the end it compares the checksum
                        yield piece

            if not array.num_bytes:
                return array.of(np.empty(0, np.uint8))
            found = os.fstat(file.fileno())
            version = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
            return array.of(host_copy(f"{version} {name}", array.num_bytes, content))

    with _explained(path, ".npz"), open_regular(path.resolve()) as file, zipfile.ZipFile(file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
    return Arrays(list(members), read, [])


@contextmanager
def _explained(path: Path, suffix: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except UNREADABLE as error:
        raise UsageError(
            f"{path} is not a readable {suffix} file of numbers: {error}. Objects and pickles are refused, since "
            "loading them could run code: save plain arrays with numpy.savez(path, inputs=…, targets=…)."
        ) from error


class _Array(NamedTuple):
    """An array by its header in numpy's format."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    start: int
    """Where its values start, in bytes."""

    @classmethod
    def described_in(cls, stream: IO[bytes]) -> "_Array":
        """ValueError unless it holds plain numbers."""
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"it is of version {version} of numpy's format, which plain numbers do not need")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
        if dtype.kind not in "biuf" or not dtype.isnative:
            raise ValueError(f"it has dtype {dtype}")
        if min(shape, default=0) < 0:
            raise ValueError(f"it has shape {shape}")
        return cls(shape, is_fortran, dtype, stream.tell())

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def check_bytes(self, size: int) -> None:
        """ValueError unless these are the bytes of the whole file."""
        if size != self.start + self.num_bytes:
            raise ValueError(
                f"{size:,} bytes for an array of shape {self.shape} and dtype {self.dtype}, which has "
                f"{self.start + self.num_bytes:,}"
            )

    def of(self, values: Bytes) -> Tensor:
        array: NDArray[Any] = _aligned(values, self.dtype.itemsize).view(self.dtype)
        return torch.from_numpy(array.reshape(self.shape, order="F" if self.is_fortran else "C"))


def _aligned(values: Bytes, item_bytes: int) -> Bytes:
    """The bytes, copied where they lie askew for values of this size."""
    return values if values.ctypes.data % item_bytes == 0 else values.copy()
