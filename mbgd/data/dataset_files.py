"""Files and folders as one `datasets.Dataset`: selects and orders the files, and checks that their columns match."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mbgd.errors import UsageError

READERS = {
    ".parquet": "from_parquet",
    ".arrow": "from_file",
    ".csv": "from_csv",
    ".json": "from_json",
    ".jsonl": "from_json",
}
SAVED = ("state.json", "dataset_dict.json")
"""The file that `save_to_disk` writes into the folder of one dataset, or of several splits."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in a file's name, or else in its folders' names, by which the Hub recognises a split."""

NO_DATA = ("dataset_infos.json", "dataset_info.json")
MOST_NAMES = 10


def name_of(path: str | Sequence[str]) -> str:
    """The dataset's name in errors."""
    return path if isinstance(path, str) else _listed([str(one) for one in path])


def open_dataset(path: str | Sequence[str], split: str) -> Any:
    """These paths concatenated as one `datasets.Dataset`, memory-mapped; UsageError if that is impossible.

    A path is a folder made by `save_to_disk`, a file, a folder of files or a glob. Files of one path are sorted by
    name, with numbers by value. If the folder or the glob matches several splits, `split` selects one.
    """
    if find_spec("datasets") is None:
        raise UsageError(
            "data=huggingface needs the package datasets, which is not installed here: pip install 'mbgd[huggingface]'"
        )
    paths = [path] if isinstance(path, str) else [str(one) for one in path]
    if not paths:
        raise UsageError("data.path names no file or folder; it must name at least one.")
    saved_or_files = [(one, _files(one, split)) for one in paths]
    _check_distinct([file for _, files in saved_or_files for file in files])
    parts = [part for one, files in saved_or_files for part in _read(one, files, split)]
    return _joined(parts)


def _files(path: str, split: str) -> list[Path]:
    """The files of a path, in order; for a folder made by `save_to_disk` the folder itself."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix not in READERS:
            raise UsageError(f"data.path={path}; a file must end in {', '.join(READERS)}.")
        return [place]
    if place.is_dir():
        if any((place / name).exists() for name in SAVED):
            return [place]
        found = sorted(_data_files(place), key=_natural)
        if not found:
            raise UsageError(
                f"data.path={path} holds no file that ends in {', '.join(READERS)}, and `save_to_disk` has not made "
                f"it. {_holds(place)}"
            )
        return _of_split(path, place, found, split, is_glob=False)
    if not glob.has_magic(path):
        raise UsageError(f"data.path={path}: there is no such file or folder. Datasets are not downloaded.")
    matches = [Path(name) for name in glob.glob(str(place), recursive=True)]  # noqa: PTH207  (which may be absolute)
    found = sorted((match for match in matches if match.is_file() and match.suffix in READERS), key=_natural)
    if not found:
        top = next(parent for parent in place.parents if not glob.has_magic(str(parent)))
        raise UsageError(f"data.path={path} matches no file that ends in {', '.join(READERS)}. {_holds(top)}")
    return _of_split(path, Path(os.path.commonpath([file.parent for file in found])), found, split, is_glob=True)


def _data_files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be listed: {error}.") from error

    seen = set()
    for inner, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(inner).resolve()
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix in READERS and not name.startswith(".") and name not in NO_DATA:
                yield Path(inner, name)


def _of_split(path: str, folder: Path, files: list[Path], split: str, *, is_glob: bool) -> list[Path]:
    """The files of the split, by their names below the folder, as on the Hub."""
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1:
        raise UsageError(
            f"data.path={path} holds files of several kinds, {', '.join(suffixes)}; name one, as in *.csv."
        )
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if len(splits) == 1 and (is_glob or None in splits):
        return files
    if None in splits:
        named = next(files[0] for name, files in splits.items() if name is not None)
        raise UsageError(
            f"data.path={path}: the name of {splits[None][0]} names no split (train, validation, test), but that of "
            f"{named} does. Name a split in all, or set data.path to a glob or a list of the files to read."
        )
    wanted = next((name for name, words in SPLITS.items() if split in words), split)
    if wanted not in splits:
        raise UsageError(f"{path} has no split {split!r}; it has {', '.join(name for name in splits if name)}.")
    return splits[wanted]


def _split_of(file: Path) -> str | None:
    """The split named by the last part of the path that names one; UsageError if that part names several."""
    for part in (file.stem, *reversed(file.parts[:-1])):
        words = re.split(r"[-._ 0-9]+", part.lower())
        found = [split for split, known in SPLITS.items() if any(word in known for word in words)]
        if len(found) > 1:
            raise UsageError(
                f"the name {file} names several splits, {', '.join(found)}. Set data.path to the file itself."
            )
        if found:
            return found[0]
    return None


def _natural(file: Path) -> tuple[list[str | int], str]:
    """Sort key: part-2 comes before part-10."""
    pieces = re.split(r"(\d+)", str(file))
    return [int(piece) if number % 2 else piece for number, piece in enumerate(pieces)], str(file)


def _check_distinct(files: list[Path]) -> None:
    seen: dict[Path, Path] = {}
    for file in files:
        if (first := seen.setdefault(file.resolve(), file)) is not file:
            raise UsageError(f"data.path names {file} twice ({first}); its rows would count twice. Name it once.")


def _read(path: str, files: list[Path], split: str) -> list[tuple[str, Any]]:
    """(name, dataset) pairs."""
    import datasets  # takes seconds

    datasets.disable_progress_bars()
    with _explained(path):
        if files[0].is_dir():
            return [(path, _saved(path, datasets.load_from_disk(str(files[0])), split))]
    if files[0].suffix == ".parquet":
        return [(path, _read_parquet(path, files))]
    parts = []
    for file in files:  # one by one: these formats reveal columns and types only when read
        with _explained(file):
            name = str(file) if file.suffix == ".arrow" else glob.escape(str(file))
            parts.append((str(file), getattr(datasets.Dataset, READERS[file.suffix])(name)))
    return parts


def _saved(path: str, saved: Any, split: str) -> Any:
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise UsageError(f"{path} has no split {split!r}; it has {', '.join(saved)}.")
    return saved[split]


def _read_parquet(path: str, files: list[Path]) -> Any:
    """Read all files at once, which is fast for thousands of them, after comparing the schemas in their footers."""
    import datasets
    import pyarrow.parquet as pq

    kinds, num_rows = [], 0
    for file in files:
        with _explained(file):
            kinds.append((str(file), datasets.Features.from_arrow_schema(pq.read_schema(file))))
            num_rows += pq.read_metadata(file).num_rows
    _check_alike(kinds)
    with _explained(path):
        dataset = datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files])  # it expands globs itself
    assert len(dataset) == num_rows
    return dataset


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Turns errors from reading this path into UsageError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        reason = error.__cause__ or error
        raise UsageError(f"{path} cannot be read: {type(reason).__name__}: {reason}") from error


def _joined(parts: list[tuple[str, Any]]) -> Any:
    from datasets import concatenate_datasets

    _check_alike([(name, dataset.features) for name, dataset in parts])
    if len(parts) == 1:
        return parts[0][1]
    columns = parts[0][1].column_names
    return concatenate_datasets([dataset.select_columns(columns) for _, dataset in parts])


def _check_alike(kinds: list[tuple[str, Any]]) -> None:
    """UsageError unless all have the same columns, of the same types and classes."""
    first_name, first = kinds[0]
    for name, features in kinds[1:]:
        for column in [*first, *features]:
            one, other = first.get(column, "missing"), features.get(column, "missing")
            if one != other:
                raise UsageError(
                    f"{first_name} and {name} do not have the same columns: {column!r} is {one} in the one and {other} "
                    "in the other. Write them with the same columns, or set data.path to files that match."
                )


def _holds(folder: Path) -> str:
    """The folder's contents, for an error's text."""
    while not folder.is_dir():
        folder = folder.parent
    try:
        return f"{folder} holds {_listed(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}."
    except OSError as error:
        return f"{folder} cannot be listed: {error}."


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
