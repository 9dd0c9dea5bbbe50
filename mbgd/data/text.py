"""Text as bytes: a language model's examples from plain files, packed once and memory-mapped.

Tokens 0 to 255 are bytes, 256 is the end of a document. A corpus is packed as one uint16 stream 256, document, 256,
document, …, 256, in a folder named after a hash of the corpus, under $XDG_CACHE_HOME/mbgd or ~/.cache/mbgd. All
workers of a host map the same file.
"""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbgd.data.windows import TokenWindows
from mbgd.errors import UsageError
from mbgd.files.file_lock import locked

END_OF_DOCUMENT = 256
VOCABULARY = 257
PIECE_BYTES = 2**24
# Installed packages are not the standard library; its tests are left out because distributions leave them out.
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

U16 = NDArray[np.uint16]


def text(
    split: str,
    context: int,
    path: str | None = None,
    *,
    pattern: str = "*",
    evaluation_share: float = 0.1,
    ignore_index: int = -100,
) -> TokenWindows | None:
    """The windows of a split, "train" or "evaluation", of a corpus in which every file is a document.

    path: a file, or a folder whose files that match `pattern` are read, without hidden ones; None: the .py files of the
    running Python's standard library, without its tests. Documents are ordered by a hash of their names; the last
    `evaluation_share` of the stream is for evaluation (0: returns None), and the document across that boundary is
    split in two. UsageError if nothing can be read.
    """
    if split not in ("train", "evaluation"):
        raise UsageError(f"text has no split {split!r}; it must be train or evaluation.")
    if not 0 <= evaluation_share < 1:
        raise UsageError(f"data.evaluation_share={evaluation_share}; it must be ≥ 0 and < 1.")
    if split == "evaluation" and evaluation_share == 0:
        return None
    tokens, ends = _packed(_standard_library() if path is None else _documents(Path(path).expanduser(), pattern))
    cut = round((len(tokens) - 1) * (1 - evaluation_share))
    boundaries = np.union1d(ends, [cut])
    boundaries = boundaries[boundaries <= cut] if split == "train" else boundaries[boundaries >= cut]
    return TokenWindows(tokens, boundaries, context=context, vocabulary=VOCABULARY, ignore_index=ignore_index)


def _standard_library() -> dict[str, Path]:
    return _documents(Path(sysconfig.get_paths()["stdlib"]), "*.py", left_out=NOT_THE_LIBRARY)


def _documents(path: Path, pattern: str, left_out: frozenset[str] = frozenset()) -> dict[str, Path]:
    """The files of a corpus by name, in the order of their names' hashes; empty ones are left out."""
    if path.is_file():
        found = {path.name: path}
    elif path.is_dir():
        found = {str(file.relative_to(path)): file for file in _files(path, pattern, left_out)}
    else:
        raise UsageError(f"data.path={path}: there is no such file or folder.")
    found = {name: file for name, file in found.items() if file.stat().st_size}
    if not found:
        raise UsageError(
            f"data.path={path} holds no text: it has no non-empty file that matches data.pattern={pattern}."
        )
    return dict(sorted(found.items(), key=lambda item: hashlib.sha256(os.fsencode(item[0])).digest()))


def _files(folder: Path, pattern: str, left_out: frozenset[str]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for name in names:
            if fnmatch(name, pattern) and not name.startswith("."):
                yield Path(parent, name)


def _packed(documents: dict[str, Path]) -> tuple[U16, NDArray[np.int64]]:
    """The corpus's stream, memory-mapped, and the positions where documents end; packs the corpus if needed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mbgd").expanduser()
    digest = _read(documents)
    folder = cache / f"text-{digest[:32]}"
    try:
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with locked(Path(f"{folder}.lock")):  # the first worker packs, the others wait for it
                if not folder.exists():
                    _pack(documents, digest, folder)
        ends = np.load(folder / "ends.npy")
        tokens = np.memmap(folder / "tokens.bin", np.uint16, mode="r")
    except UsageError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"packed text cannot be kept in {folder} ({error}). Set XDG_CACHE_HOME to a writable folder, or delete "
            "this one if it is damaged."
        ) from error
    if len(tokens) != ends[-1] + 1:
        raise UsageError(f"{folder} is damaged: {len(tokens)} tokens instead of {ends[-1] + 1}. Delete it.")
    return tokens, ends


def _pack(documents: dict[str, Path], digest: str, folder: Path) -> None:
    """Write the folder atomically."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        ends, position = [], 0
        with (temporary / "tokens.bin").open("wb") as file:

            def write(tokens: U16) -> None:
                nonlocal position
                file.write(tokens.data)
                if tokens[-1] == END_OF_DOCUMENT:
                    ends.append(position + len(tokens) - 1)
                position += len(tokens)

            if _read(documents, write) != digest:
                raise UsageError("the text changed while it was read. Start again once it is complete.")
            file.flush()
            os.fsync(file.fileno())
        with (temporary / "ends.npy").open("wb") as file:
            np.save(file, np.array(ends, np.int64))
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise a worker on another host, out of the lock's reach, was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(documents: dict[str, Path], write: Callable[[U16], Any] = lambda tokens: None) -> str:
    """Read every document; pass the stream to `write` in pieces; return the hash of names and contents."""
    whole = hashlib.sha256()
    end = np.array([END_OF_DOCUMENT], np.uint16)
    write(end)
    for name, path in documents.items():
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
                    write(np.frombuffer(piece, np.uint8).astype(np.uint16))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
        write(end)
        whole.update(hashlib.sha256(os.fsencode(name)).digest() + digest.digest())
    return whole.hexdigest()
