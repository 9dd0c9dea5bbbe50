"""Explains what a model says of bytes, which the trainer passes on as they are."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mbgd.batches.nested import leaves_of
from mbgd.errors import UsageError

TORCHS_WORDS = "Byte|unsigned char|uint8|dtype|scalar type"


@contextmanager
def told_of_bytes(batch: Any) -> Iterator[None]:
    """A torch error about dtypes inside becomes a UsageError with a remedy, if the batch holds uint8 tensors."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        leaves = leaves_of(batch)
        names = [name or "the batch" for name, leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype is torch.uint8]
        if not names or not re.search(TORCHS_WORDS, str(error)):
            raise
        raise UsageError(
            f"the objective fails on a batch with uint8 values ({', '.join(names)}): {type(error).__name__}: "
            f"{error}. Bytes come to the device as bytes. Cast them in the objective or the model, such as "
            "images.float() / 255 or ids.long(); docs/data.md has an example."
        ) from error
