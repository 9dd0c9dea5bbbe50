"""The datasets that ship: what they hold, the same in any batch, and what they refuse."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import mbgd
from mbgd.data import InMemory, Regression, digits, fashion_mnist, tensors

DIGITS = Path(__file__).parent.parent / "mbgd/data/digits.npz"
PACKAGED = Path("/usr/share/datasets/fashion-mnist")


def test_digits_are_scikit_learns() -> None:
    everything, train, test = (digits(split) for split in ("all", "train", "test"))
    wanted = load_digits()
    assert np.array_equal(everything.inputs.squeeze(1).numpy() * 16, wanted.images)
    assert np.array_equal(everything.targets.numpy(), wanted.target)
    assert (len(everything), len(train), len(test)) == (1797, 1437, 360)
    assert everything.input_shape == (1, 8, 8)
    assert everything.num_outputs == 10


def test_digits_that_are_damaged_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "digits.npz"
    monkeypatch.setitem(digits.__globals__, "FILE", path)
    for content in (None, b"", b"PK\x03\x04 cut off", DIGITS.read_bytes()[:-1000]):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(mbgd.UsageError, match=r"digits.npz cannot be read .*install mbgd again"):
            digits("train")


def test_the_digits_splits_share_no_example_and_hold_every_class_alike() -> None:
    everything, train, test = (digits(split) for split in ("all", "train", "test"))

    def rows(dataset: InMemory) -> list[bytes]:
        return [dataset[i][0].numpy().tobytes() + bytes([int(dataset[i][1])]) for i in range(len(dataset))]

    assert sorted(rows(train) + rows(test)) == sorted(rows(everything))
    share = torch.bincount(test.targets) / torch.bincount(everything.targets)
    assert share.min() > 0.19
    assert share.max() < 0.21


def idx(values: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for prefix, count in (("train", 7), ("t10k", 3)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_idx_files_plain_and_gzip(fashion_folder: Path) -> None:
    train, test = (fashion_mnist(split, str(fashion_folder)) for split in ("train", "test"))
    assert (len(train), len(test)) == (7, 3)
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    assert torch.allclose(
        train.inputs.squeeze(1), (torch.from_numpy(images).float() / 255 - 0.2860406) / 0.3530242, atol=1e-6
    )
    assert train.targets.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-labels-idx1-ubyte").unlink(), "apt-get install dataset-fashion-mnist"),
        (lambda folder: cut_short(folder / "train-images-idx3-ubyte.gz"), "not a whole gzip file"),
        (lambda folder: cut_short(folder / "train-labels-idx1-ubyte"), "header says shape"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(b""), "begins with"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(b"PNG.abc"), "begins with"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 3, 0])), "header"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 13, 1])), "unsigned bytes"),
        (lambda folder: labels(folder, np.arange(6)), "a label for each image"),
        (lambda folder: labels(folder, np.full(7, 10)), "label 10"),
    ],
)
def test_damaged_files_are_named(fashion_folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(fashion_folder)
    with pytest.raises(mbgd.UsageError, match=message) as caught:
        fashion_mnist("train", str(fashion_folder))
    assert str(fashion_folder) in str(caught.value)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def labels(folder: Path, values: NDArray[Any]) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(values.astype(np.uint8)))


@pytest.mark.skipif(not PACKAGED.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_packaged_fashion_mnist() -> None:
    train, test = (fashion_mnist(split, str(PACKAGED)) for split in ("train", "test"))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert torch.bincount(train.targets).tolist() == [6000] * 10
    assert abs(float(train.inputs.mean())) < 1e-4
    assert abs(float(train.inputs.std()) - 1) < 1e-4


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 40))
def test_regression_examples_do_not_depend_on_their_batch(
    numbers: list[int], num_targets: int, num_features: int
) -> None:
    data = Regression(1000, num_features, num_targets, seed=3)
    inputs, targets = data.gather(torch.tensor(numbers))
    for row, number in enumerate(numbers):
        assert torch.equal(inputs[row], data[number][0])
        assert torch.equal(targets[row], data[number][1])
        assert torch.equal(Regression(500, num_features, num_targets, seed=3, first=number)[0][1], targets[row])


def test_regression_is_what_it_says() -> None:
    data = Regression(20_000, 8, 2, noise=0.5)
    inputs, targets = data.gather(torch.arange(len(data)))
    assert inputs.shape == (20_000, 8)
    assert abs(float(inputs.std()) - 1) < 0.01
    residual = targets - inputs @ data.coefficients
    assert abs(float(residual.std()) - 0.5) < 0.01
    found = torch.linalg.lstsq(inputs, targets).solution
    assert torch.allclose(found, data.coefficients, atol=0.02)


def test_a_regression_of_any_size_takes_no_memory() -> None:
    data = Regression(10**12, 4)
    assert len(data) == 10**12
    assert torch.isfinite(data[10**12 - 1][1]).all()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_own_tensors_keep_their_bits(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "inputs": random.normal(size=(9, 4)),
        "targets": np.arange(9, dtype=np.int64) % 3,
        "eval_inputs": random.normal(size=(2, 4)),
        "eval_targets": np.array([0, 1], np.int64),
    }
    path = tmp_path / f"own{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    for split, prefix in (("train", ""), ("evaluation", "eval_")):
        data = tensors(str(path), split)
        assert data is not None
        assert np.array_equal(data.inputs.numpy(), arrays[f"{prefix}inputs"])
        assert np.array_equal(data.targets.numpy(), arrays[f"{prefix}targets"])
        assert data.inputs.dtype == torch.float64


def test_own_tensors_need_no_evaluation(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", inputs=np.zeros((3, 1)), targets=np.zeros(3, np.int32))
    assert tensors(str(tmp_path / "own.npz"), "evaluation") is None
    train = tensors(str(tmp_path / "own.npz"), "train")
    assert train is not None
    assert train.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.zeros((3, 1))}, "targets"),
        ({"inputs": np.zeros((3, 1)), "targets": np.zeros(2)}, "3 inputs and 2 targets"),
        ({"inputs": np.zeros((0, 1)), "targets": np.zeros(0)}, "0 examples"),
        ({"inputs": np.array([{}, {}]), "targets": np.zeros(2)}, "pickles are refused"),
    ],
)
def test_own_tensors_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(mbgd.UsageError, match=message):
        tensors(str(tmp_path / "own.npz"), "train")
