"""Token ids from a flat binary file, as nanoGPT's prepare.py writes them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbgd.data.windows import TokenWindows
from mbgd.errors import UsageError

DTYPES = {"uint16": np.uint16, "uint32": np.uint32}
PIECE_TOKENS = 2**24


def tokens(
    path: str, context: int, vocabulary: int, *, dtype: str = "uint16", ignore_index: int = -100
) -> TokenWindows:
    """The windows of one stream of token ids, memory-mapped; dtype: uint16 or uint32, little-endian.

    UsageError if the file is missing, has fewer than two tokens or a part of one, or has an id outside the vocabulary.
    """
    if dtype not in DTYPES:
        raise UsageError(f"data.dtype={dtype}; it must be uint16 or uint32.")
    stream = _mapped(Path(path).expanduser(), np.dtype(DTYPES[dtype]).newbyteorder("<"))
    _check_ids(path, stream, vocabulary)
    boundaries = np.array([0, len(stream) - 1])
    return TokenWindows(stream, boundaries, context=context, vocabulary=vocabulary, ignore_index=ignore_index)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file of tokens. Set data.folder, or data.evaluation=null.")
    size = path.stat().st_size
    if size % dtype.itemsize or size < 2 * dtype.itemsize:
        raise UsageError(
            f"{path} has {size} bytes; it must hold at least 2 tokens of {dtype.itemsize} bytes each ({dtype.name}), "
            "and nothing else. Set data.dtype, or get the file again."
        )
    return np.memmap(path, dtype, mode="r")


def _check_ids(path: str, stream: NDArray[Any], vocabulary: int) -> None:
    """Check every token, which reads the whole file: a wrong id must not end the run after hours."""
    if vocabulary < 1:
        raise UsageError(f"data.vocabulary={vocabulary}; it must be ≥ 1.")
    if vocabulary > np.iinfo(stream.dtype).max:
        return
    for first in range(0, len(stream), PIECE_TOKENS):
        piece = stream[first : first + PIECE_TOKENS]
        if piece.max() >= vocabulary:
            position = first + int((piece >= vocabulary).argmax())
            raise UsageError(
                f"{path}: token {int(stream[position])} at position {position}; data.vocabulary={vocabulary}, so an id "
                f"must be 0 to {vocabulary - 1}. Set data.vocabulary, or data.dtype if the ids make no sense."
            )
