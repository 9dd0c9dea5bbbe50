"""Fashion-MNIST: 70,000 grey images of 28 × 28 pixels, 10 classes of clothing, from files on this machine."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mbgd.data.in_memory import InMemory
from mbgd.errors import UsageError

FILE_PREFIXES = {"train": "train", "test": "t10k"}
TRAIN_MEAN = 0.2860406
TRAIN_STD = 0.3530242
NUM_CLASSES = 10
UNSIGNED_BYTE = 0x08


def fashion_mnist(split: str, folder: str) -> InMemory:
    """The images of a split, "train" (60,000 examples) or "test" (10,000), from IDX files, plain or gzip, in `folder`.

    Inputs are float32, shape (1, 28, 28), normalised by the training pixels' mean and standard deviation; targets are
    int64. UsageError if a file is missing or damaged.

    Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv:1708.07747.
    """
    if split not in FILE_PREFIXES:
        raise UsageError(f"fashion_mnist has no split {split!r}; it must be train or test.")
    prefix = FILE_PREFIXES[split]
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28):
        raise UsageError(f"{images_path} has shape {images.shape}; expected (number of images, 28, 28).")
    if labels.shape != images.shape[:1]:
        raise UsageError(
            f"{labels_path} has shape {labels.shape}, not {images.shape[:1]}: a label for each image of {images_path}."
        )
    if len(labels) == 0 or labels.max() >= NUM_CLASSES:
        got = f"label {labels.max()}" if len(labels) else "no label"
        raise UsageError(f"{labels_path} holds {got}; expected labels from 0 to {NUM_CLASSES - 1}.")
    inputs = torch.from_numpy(images).to(torch.float32).unsqueeze(1)
    inputs.div_(255).sub_(TRAIN_MEAN).div_(TRAIN_STD)
    return InMemory(inputs, torch.from_numpy(labels).to(torch.int64))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an IDX file, plain or (named .gz) gzip; UsageError if it is damaged.

    IDX: two zero bytes, one for the type, one for the number of dimensions; the sizes as big-endian 32-bit numbers;
    the values, last dimension fastest.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is not a whole gzip file ({error}). Get it again.") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UsageError(f"{path} begins with bytes {content[:4].hex(' ')!r}; an IDX file begins with 00 00.")
    if content[2] != UNSIGNED_BYTE:
        raise UsageError(f"{path} holds values of IDX type 0x{content[2]:02x}; expected unsigned bytes, type 0x08.")
    num_dimensions = content[3]
    start = 4 + 4 * num_dimensions
    if len(content) < start:
        raise UsageError(
            f"{path} ends after {len(content)} bytes; the header of {num_dimensions} dimensions alone takes {start}."
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dimensions, offset=4))
    if len(content) != start + math.prod(shape):
        raise UsageError(
            f"{path} holds {len(content) - start} values; its header says shape {shape}, which is "
            f"{math.prod(shape)} values. Get the file again."
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape)


def _find(folder: str, name: str) -> Path:
    for path in (Path(folder).expanduser() / name, Path(folder).expanduser() / f"{name}.gz"):
        if path.is_file():
            return path
    raise UsageError(
        f"Fashion-MNIST: neither {name} nor {name}.gz is in folder {folder}. On Debian and Ubuntu "
        "`apt-get install dataset-fashion-mnist` puts the files under /usr/share/datasets/fashion-mnist; "
        "files elsewhere are found with data.folder=…"
    )
