"""scikit-learn's handwritten digits: 1,797 grey images of 8 × 8 pixels, 10 classes."""

import gzip
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from mbgd.data.in_memory import InMemory
from mbgd.errors import UsageError

LARGEST_PIXEL = 16
TEST_EVERY = 5


def digits(split: str) -> InMemory:
    """The digits of a split: "train" (1,437 examples), "test" (360) or "all" (1,797, in the file's order).

    Inputs are float32 in [0, 1], shape (1, 8, 8); targets int64. The split is fixed: with the examples sorted by
    class and, within a class, in the file's order, every fifth one is a test example. So both splits hold every
    class in the same share. UsageError if scikit-learn, whose package holds the file, is not installed.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (its test set).
    """
    if split not in ("train", "test", "all"):
        raise UsageError(f"digits has no split {split!r}; it must be train, test or all.")
    path = _path()
    try:
        text = gzip.decompress(path.read_bytes())
        rows = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Install it again: pip install scikit-learn") from error
    inputs = torch.from_numpy(rows[:, :-1] / LARGEST_PIXEL).view(-1, 1, 8, 8)
    targets = torch.from_numpy(rows[:, -1].astype(np.int64))
    everything = InMemory(inputs, targets)
    if split == "all":
        return everything
    is_test = torch.zeros(len(targets), dtype=torch.bool)
    is_test[targets.argsort(stable=True)[::TEST_EVERY]] = True
    return InMemory(*everything.gather((is_test if split == "test" else ~is_test).nonzero().squeeze(1)))


def _path() -> Path:
    # The package's folder is looked up without importing the package, which takes about a second.
    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return path
    raise UsageError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
