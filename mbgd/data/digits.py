"""Handwritten digits: 1,797 grey images of 8 × 8 pixels, 10 classes.

`digits.npz` beside this file holds them: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, its test
set, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). They are scikit-learn's `load_digits`, in its order, as uint8.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from mbgd.data.in_memory import InMemory
from mbgd.errors import UsageError

FILE = Path(__file__).with_name("digits.npz")
LARGEST_PIXEL = 16
TEST_EVERY = 5


def digits(split: str) -> InMemory:
    """The digits of a split: "train" (1,437 examples), "test" (360) or "all" (1,797, in the file's order).

    Inputs are float32 in [0, 1], shape (1, 8, 8); targets int64. The split is fixed: with the examples sorted by
    class and, within a class, in the file's order, every fifth one is a test example. So both splits hold every
    class in the same share.
    """
    if split not in ("train", "test", "all"):
        raise UsageError(f"digits has no split {split!r}; it must be train, test or all.")
    try:
        with np.load(FILE) as arrays:
            pixels, classes = arrays["inputs"], arrays["targets"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{FILE} cannot be read ({error}). It is part of mbgd: install mbgd again.") from error
    inputs = torch.from_numpy(pixels.astype(np.float32) / LARGEST_PIXEL).unsqueeze(1)
    targets = torch.from_numpy(classes.astype(np.int64))
    everything = InMemory(inputs, targets)
    if split == "all":
        return everything
    is_test = torch.zeros(len(targets), dtype=torch.bool)
    is_test[targets.argsort(stable=True)[::TEST_EVERY]] = True
    return InMemory(*everything.gather((is_test if split == "test" else ~is_test).nonzero().squeeze(1)))
