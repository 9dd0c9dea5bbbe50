"""`data=tensors` lies once on a host: what workers map, what stays their own, and what damaged files lead to."""

import fcntl
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

import mbgd
from mbgd.data import tensors
from mbgd.data.host_copy import SEALS, _label, host_copy

from processes import run_workers

FORMATS = [".npz", "compressed.npz", ".safetensors", "folder"]
RANDOM = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "inputs": RANDOM.normal(size=(50, 3, 4)).astype(np.float32),
    "targets": RANDOM.integers(0, 5, (50, 4)).astype(np.uint8),
    "eval_inputs": RANDOM.normal(size=(7, 3, 4)).astype(np.float32),
    "eval_targets": RANDOM.integers(0, 5, (7, 4)).astype(np.uint8),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mbgd"


def write(folder: Path, kind: str, arrays: dict[str, Any] = ARRAYS) -> str:
    path = folder / f"own{kind}"
    if kind == ".safetensors":
        save_file(arrays, path)
    elif kind == "folder":
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    else:
        (np.savez_compressed if kind == "compressed.npz" else np.savez)(path, **arrays)
    return str(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_examples(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    for split, prefix in (("train", ""), ("evaluation", "eval_")):
        data = tensors(path, split)
        assert data is not None
        inputs, targets = (torch.from_numpy(ARRAYS[f"{prefix}{name}"]) for name in ("inputs", "targets"))
        indices = torch.tensor([3, 0, 6, 3])
        for mine, wanted in zip(data.gather(indices), (inputs[indices], targets[indices].long()), strict=True):
            assert mine.dtype is wanted.dtype
            assert torch.equal(mine, wanted)
        assert torch.equal(data[2][1], targets[2].long())
        assert data[2][1].dtype is torch.int64
        assert data.num_outputs == targets.max() + 1


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["bool", "uint16", "int8", "float16", ">f4", "fortran", "scalar"])
def test_other_dtypes_and_layouts(tmp_path: Path, kind: str, dtype: str) -> None:
    targets = {"fortran": np.asfortranarray(ARRAYS["targets"]), "scalar": ARRAYS["targets"][:, 0].copy()}.get(dtype)
    if targets is None:
        targets = (ARRAYS["targets"] > 2).astype(dtype)
    if kind == ".safetensors" and dtype in (">f4", "fortran"):
        return  # its writer makes them native and contiguous
    path = write(tmp_path, kind, {"inputs": ARRAYS["inputs"], "targets": targets})
    if dtype == ">f4":
        with pytest.raises(mbgd.UsageError, match=r"is not a readable .* of numbers: it has dtype >f4"):
            tensors(path, "train")
        return
    data = tensors(path, "train")
    assert data is not None
    _, found = data.gather(torch.arange(50))
    assert found.dtype is (torch.float16 if dtype == "float16" else torch.int64)
    assert np.array_equal(found.numpy(), targets)
    if dtype != "float16":
        mbgd.CrossEntropy().check_targets(data.targets, num_classes=5)
        assert data.num_outputs == int(targets.max()) + 1


# Workers of one host


def mapping(values: Tensor) -> tuple[str, str]:
    """Device and inode of the file that is mapped where these values lie."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, device, inode, *_ = line.split()
        start, stop = (int(end, 16) for end in place.split("-"))
        if start <= values.data_ptr() < stop:
            return device, inode
    raise AssertionError


def look(workers: mbgd.Workers, path: str, cache: str) -> Any:
    os.environ["XDG_CACHE_HOME"] = cache
    data = tensors(path, "train")
    assert data is not None
    found = [mapping(values) for values in (data.inputs, data.targets)]
    if workers.is_main:
        data.inputs.zero_()
    workers.barrier()
    return found, data.inputs.clone()


@pytest.mark.parametrize("kind", FORMATS)
def test_workers_map_the_same_pages_and_write_to_their_own(tmp_path: Path, cache: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    (first, zeros), (second, inputs), (third, _) = run_workers(look, 3, path, str(cache.parent))
    assert first == second == third
    assert all(inode != "0" for _, inode in first)
    assert not zeros.any()
    assert np.array_equal(inputs.numpy(), ARRAYS["inputs"])
    if kind != "folder":
        reread = tensors(path, "train")
        assert reread is not None
        assert np.array_equal(reread.inputs.numpy(), ARRAYS["inputs"])


def test_another_file_of_the_same_name_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path, ".npz")
    first = tensors(path, "train")
    write(tmp_path, ".npz", {name: array + 1 for name, array in ARRAYS.items()})
    second = tensors(path, "train")
    assert first is not None
    assert second is not None
    assert torch.equal(second.inputs, first.inputs + 1)


def test_the_bytes_are_found_as_long_as_they_are_used() -> None:
    made = host_copy("key", 3, lambda: [b"a", b"bc"])
    found = host_copy("key", 3, lambda: [b"def"])
    assert (made.tobytes(), found.tobytes()) == (b"abc", b"abc")
    assert host_copy("another key", 3, lambda: [b"def"]).tobytes() == b"def"
    del made
    again = host_copy("key", 3, lambda: [b"def"])
    assert again.tobytes() == b"abc"
    del found, again
    assert host_copy("key", 3, lambda: [b"ghi"]).tobytes() == b"ghi"


@pytest.mark.parametrize(("size", "seals"), [(3, 0), (4, SEALS)])
def test_a_file_in_memory_that_could_change_or_has_another_size_is_not_taken(size: int, seals: int) -> None:
    label = _label("key")
    planted = os.memfd_create(label, os.MFD_ALLOW_SEALING)
    try:
        os.write(planted, b"x" * size)
        fcntl.fcntl(planted, fcntl.F_ADD_SEALS, seals)
        assert host_copy("key", 3, lambda: [b"abc"]).tobytes() == b"abc"
    finally:
        os.close(planted)


def test_a_content_that_fails_leaves_nothing() -> None:
    def content() -> Any:
        yield b"a"
        raise mbgd.UsageError("damaged")

    for _ in range(2):
        with pytest.raises(mbgd.UsageError, match="damaged"):
            host_copy("key", 3, content)
    assert host_copy("key", 3, lambda: [b"abc"]).tobytes() == b"abc"


def test_without_a_cache_every_worker_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = tensors(write(tmp_path, ".npz"), "train")
    assert data is not None
    assert np.array_equal(data.inputs.numpy(), ARRAYS["inputs"])


def test_what_takes_too_much_memory_is_refused() -> None:
    with pytest.raises(mbgd.UsageError, match=r"bytes of memory cannot be allocated"):
        host_copy("large", 2**50, lambda: [])


# Files that change while they are mapped


def shorten(path: Path) -> None:
    os.truncate(path, 100)


def write_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")


@pytest.mark.parametrize("change", [shorten, write_over])
@pytest.mark.parametrize("kind", [".safetensors", "folder"])
def test_a_file_written_to_while_it_is_mapped_is_named(
    tmp_path: Path, kind: str, change: Callable[[Path], None]
) -> None:
    path = Path(write(tmp_path, kind))
    file = path / "inputs.npy" if kind == "folder" else path
    os.utime(file, ns=(0, 0))
    data = tensors(str(path), "train")
    assert data is not None
    data.gather(torch.arange(50))
    change(file)
    for read in (lambda: data.gather(torch.arange(50)), lambda: data[0]):
        with pytest.raises(mbgd.UsageError, match=f"{file.name} has been written to since this run opened it"):
            read()


@pytest.mark.parametrize("kind", [".safetensors", "folder"])
def test_a_file_replaced_or_removed_does_no_harm(tmp_path: Path, kind: str) -> None:
    path = Path(write(tmp_path, kind))
    data = tensors(str(path), "train")
    assert data is not None
    file = path / "inputs.npy" if kind == "folder" else path
    (tmp_path / "other").write_bytes(b"another")
    (tmp_path / "other").replace(file)
    assert np.array_equal(data.gather(torch.arange(50))[0].numpy(), ARRAYS["inputs"])
    file.unlink()
    assert np.array_equal(data.gather(torch.arange(50))[0].numpy(), ARRAYS["inputs"])


# Damaged files


def npy(header: str, values: bytes = b"") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not a readable .npy file"),
        (b"\x93NUMPY\x03\x00", r"version \(3, 0\)"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n", bytes(4)), r"bytes for an array of shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n", bytes(9)), r"bytes for an array of shape"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 4), }}\n"), r"bytes for an array of shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }\n", bytes(4)), r"it has shape \(-1, -1\)"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b"cos\nsystem\n"), r"dtype object"),
        (npy("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,), }\n", bytes(8)), r"dtype datetime64"),
        (npy("__import__('os').abort()\n"), r"not a readable .npy file"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n", np.float32("nan").tobytes()),
            r"1 values .*nan",
        ),
    ],
)
def test_damaged_npy_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = Path(write(tmp_path, "folder"))
    (path / "inputs.npy").write_bytes(content)
    with pytest.raises(mbgd.UsageError, match=message):
        tensors(str(path), "train")


def safetensors(start: int, stop: int, shape: list[int], dtype: str = "F32", length: int | None = None) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    header = json.dumps({"inputs": entry}).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        safetensors(0, 16, [4]),
        safetensors(0, 8, [3]),
        safetensors(4, 8, [1]),
        safetensors(-8, 8, [2]),
        safetensors(0, 8, [2**40]),
        safetensors(0, 8, [2], length=2**60),
        safetensors(0, 8, [2], length=4),
        safetensors(0, 8, [8], "F8_E4M3").replace(b"inputs", b"output"),
    ],
)
def test_damaged_safetensors_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.safetensors"
    path.write_bytes(content)
    with pytest.raises(mbgd.UsageError, match=r"own.safetensors (is not a readable|has no)"):
        tensors(str(path), "train")


def test_unknown_dtypes_of_safetensors_are_named(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [at, at + 4]}
        for name, at in (("inputs", 0), ("targets", 4))
    }
    text = json.dumps(header).encode()
    (tmp_path / "own.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(mbgd.UsageError, match=r"inputs in .* has dtype F8_E4M3; it must be one of F64,"):
        tensors(str(tmp_path / "own.safetensors"), "train")


def test_values_that_lie_askew_keep_their_bits(tmp_path: Path) -> None:
    """Other writers need not align what follows the header."""
    path = tmp_path / "own.safetensors"
    inputs = np.arange(1.0, 5.0, dtype=np.float32)
    header: dict[str, Any] = {
        "targets": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "inputs": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
    }
    for padding in range(8):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8 + padding)
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes([1, 0, 3, 2]) + inputs.tobytes())
        data = tensors(str(path), "train")
        assert data is not None
        assert data.inputs.data_ptr() % 4 == 0
        assert (data.inputs.tolist(), data.targets.tolist()) == ([1.0, 2.0, 3.0, 4.0], [1, 0, 3, 2])


@pytest.mark.parametrize("kind", FORMATS)
def test_files_cut_or_altered_anywhere_are_refused_or_read_whole(tmp_path: Path, kind: str) -> None:
    path = Path(write(tmp_path, kind))
    file = path / "inputs.npy" if kind == "folder" else path
    content = file.read_bytes()
    draws = np.random.default_rng(1)
    for length in draws.integers(0, len(content), 30):
        file.write_bytes(content[:length])
        with pytest.raises(mbgd.UsageError, match=file.name):
            tensors(str(path), "train")
    for _ in range(60):
        altered = bytearray(content)
        altered[int(draws.integers(0, 300))] ^= int(draws.integers(1, 256))
        file.write_bytes(altered)
        try:
            data = tensors(str(path), "train")
        except mbgd.UsageError:
            continue
        assert data is not None
        data.gather(torch.arange(len(data)))
