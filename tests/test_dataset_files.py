"""Several files as one dataset: which files a path stands for, in which order, and what is refused."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mbgd
from mbgd.data import huggingface, huggingface_images

from processes import run_workers


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    return module


def write(datasets: Any, name: str, first: int, num_rows: int = 2, **columns: Any) -> None:
    """A file whose rows are numbered from `first` on."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [float(first + row) for row in range(num_rows)]
    table = datasets.Dataset.from_dict({"x": rows, "y": [0] * num_rows, **columns})
    if path.suffix == ".arrow":
        table.save_to_disk(f"{name}.saved")
        next(Path(f"{name}.saved").glob("*.arrow")).rename(path)
        for file in Path(f"{name}.saved").iterdir():
            file.unlink()
        Path(f"{name}.saved").rmdir()
    else:
        getattr(table, f"to_{path.suffix.removeprefix('.').removesuffix('l')}")(name)


def numbers(path: Any, split: str = "train") -> list[int]:
    """The rows' numbers, in their order."""
    data = huggingface(path, split, "x", "y")
    assert data is not None
    inputs, _ = data.gather(torch.arange(len(data)))
    return [int(value) for value in inputs]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "json", "jsonl"])
def test_shards_in_the_order_of_their_numbers(datasets: Any, suffix: str) -> None:
    for shard in (10, 2, 1):
        write(datasets, f"d/part-{shard}.{suffix}", 10 * shard)
    everything = [10, 11, 20, 21, 100, 101]
    for path in ("d", "d/", f"d/*.{suffix}", f"d/part-*.{suffix}", "**/part-*", str(Path("d").resolve())):
        assert numbers(path) == everything, path
        assert numbers(path, "test") == everything, path  # the names tell no splits
    assert numbers([f"d/part-10.{suffix}", f"d/part-2.{suffix}"]) == [100, 101, 20, 21]
    assert numbers([f"d/part-1?.{suffix}", f"d/part-[12].{suffix}"]) == [100, 101, 10, 11, 20, 21]
    assert numbers(f"d/part-2.{suffix}") == [20, 21]


def row_groups(folder: Path) -> None:
    """One file, and its rows in three, in row groups that end elsewhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    rows = {"x": list(random.normal(size=(50, 3)).astype(np.float32)), "y": random.integers(0, 9, 50)}
    table = pa.table(rows)
    pq.write_table(table, folder / "one.parquet", row_group_size=50)
    for number, (start, stop) in enumerate([(0, 20), (20, 21), (21, 50)]):
        pq.write_table(table.slice(start, stop - start), folder / f"part-{number}.parquet", row_group_size=7)


def gathered(path: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    data = huggingface(path, "train", "x", "y")
    assert data is not None
    return data.gather(torch.randperm(50, generator=torch.Generator().manual_seed(0)))


def test_several_parquet_files_are_the_same_rows_as_one(datasets: Any) -> None:
    row_groups(Path())
    inputs, targets = gathered("one.parquet")
    assert len(inputs.unique()) == 150
    for path in ("part-*.parquet", [f"part-{number}.parquet" for number in range(3)]):
        for mine, wanted in zip(gathered(path), (inputs, targets), strict=True):
            assert mine.dtype is wanted.dtype
            assert torch.equal(mine, wanted)


def gathered_on(workers: mbgd.Workers, folder: Path, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    import datasets

    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = cache
    return gathered("part-*.parquet")


def test_workers_that_start_together_map_one_converted_copy(datasets: Any, tmp_path: Path) -> None:
    row_groups(Path())
    cache = tmp_path / "shared"
    (inputs, targets), *others = run_workers(gathered_on, 2, Path().resolve(), cache)
    for of_worker in others:
        assert torch.equal(of_worker[0], inputs)
        assert torch.equal(of_worker[1], targets)
    assert len(list(cache.rglob("*.arrow"))) == 1


HUB = [
    {"train-00000-of-00002": 0, "train-00001-of-00002": 10, "validation": 20, "test": 30},
    {"data/train-00000-of-00002": 0, "data/train-00001-of-00002": 10, "data/valid.0": 20, "data/test_a": 30},
    {"train/0000": 0, "train/0001": 10, "val/a": 20, "test/a": 30},
    {"my_training_1": 0, "my_training_2": 10, "my_dev": 20, "my_evaluation": 30},
    {"Train1": 0, "Train2": 10, "de/dev": 20, "testing/part": 30},
]


@pytest.mark.parametrize("names", HUB)
def test_a_folders_splits_go_by_names_as_on_the_hub(datasets: Any, names: dict[str, int]) -> None:
    for name, first in names.items():
        write(datasets, f"d/{name}.parquet", first)
    Path("d/README.md").touch()
    Path("d/dataset_infos.json").write_text("{}")
    write(datasets, "d/.hidden/train.csv", 70)
    wanted = {"train": [0, 1, 10, 11], "validation": [20, 21], "test": [30, 31]}
    for split, rows in (wanted | {"val": wanted["validation"], "eval": wanted["test"]}).items():
        assert numbers("d", split) == rows
    with pytest.raises(mbgd.UsageError, match=r"d has no split 'other'; it has "):
        numbers("d", "other")
    assert numbers("d/**/*.parquet", "validation") == wanted["validation"]  # a glob whose files tell several


def test_a_glob_or_a_list_of_one_split_is_taken_as_it_is(datasets: Any) -> None:
    for name, first in (("train-0", 0), ("train-1", 10), ("validation", 20)):
        write(datasets, f"d/{name}.parquet", first)
    assert numbers("d/train-*.parquet", "test") == [0, 1, 10, 11]
    assert numbers("d/validation*", "test") == [20, 21]
    assert numbers(["d/validation.parquet", "d/train-1.parquet"], "test") == [20, 21, 10, 11]
    with pytest.raises(mbgd.UsageError, match=r"d has no split 'test'; it has train, validation"):
        numbers("d", "test")


def test_lists_of_folders_and_of_kinds(datasets: Any) -> None:
    write(datasets, "a/train.parquet", 0)
    write(datasets, "a/test.parquet", 90)
    write(datasets, "b.csv", 10)
    datasets.Dataset.from_dict({"y": [0, 0], "x": [20.0, 21.0]}).save_to_disk("c")
    assert numbers(["c", "b.csv", "a"]) == [20, 21, 10, 11, 0, 1]
    assert numbers(["a", "b.csv"], "test") == [90, 91, 10, 11]


def test_names_with_what_a_glob_would_read(datasets: Any) -> None:
    write(datasets, "d[1]/a*.parquet", 0)
    write(datasets, "d[1]/ab.parquet", 10)
    assert numbers("d[1]/a*.parquet") == [0, 1]
    assert numbers("d[1]") == [0, 1, 10, 11]


def test_linked_folders_are_followed_once(datasets: Any) -> None:
    write(datasets, "elsewhere/a.parquet", 0)
    write(datasets, "d/b.parquet", 10)
    Path("d/z").symlink_to(Path("elsewhere").resolve())
    Path("elsewhere/back").symlink_to(Path("d").resolve())
    assert numbers("d") == [10, 11, 0, 1]


def nothing(datasets: Any) -> None:
    pass


def two(second: dict[str, Any], suffix: str = "parquet") -> Callable[[Any], None]:
    """Two files, of which the second has these columns besides, or instead."""

    def make(datasets: Any) -> None:
        write(datasets, f"d/a.{suffix}", 0)
        write(datasets, f"d/b.{suffix}", 10, **second)

    return make


def named(*names: str) -> Callable[[Any], None]:
    def make(datasets: Any) -> None:
        for number, name in enumerate(names):
            write(datasets, f"d/{name}", 10 * number)

    return make


def other_classes(datasets: Any) -> None:
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        features = datasets.Features(x=datasets.Value("float64"), y=datasets.ClassLabel(names=classes))
        Path("d").mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"x": [0.0], "y": [0]}, features).to_parquet(f"d/{name}.parquet")


def one_column_less(datasets: Any) -> None:
    write(datasets, "d/a.parquet", 0, z=[1, 2])
    write(datasets, "d/b.parquet", 0)


def one_is_broken(datasets: Any) -> None:
    write(datasets, "d/a.parquet", 0)
    Path("d/b.parquet").write_bytes(b"PAR1")


def one_that_is_no_arrow(datasets: Any) -> None:
    write(datasets, "d/a.arrow", 0)
    Path("d/b.arrow").write_bytes(b"no arrow")


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (named("a.parquet", "b.csv"), "d/b.parquet", r"there is no such file or folder"),
        (named("a.parquet", "c.parquet"), "d/b*.parquet", r"matches no file .* d holds a.parquet, c.parquet\."),
        (named("a.parquet"), "d/e/*.parquet", r"matches no file .* d holds a.parquet\."),
        (named("a.parquet"), "*/e/*.parquet", r"matches no file .* holds d\."),
        (named("a.parquet", "b.csv"), "d", r"files of several kinds, .csv, .parquet; name one"),
        (named("train.parquet", "b.parquet"), "d", r"name of d/b.parquet names no split .* d/train.parquet does"),
        (named("train.parquet", "b.parquet"), "d/*", r"name of d/b.parquet names no split"),
        (named("train-test.parquet", "b.parquet"), "d", r"train-test.parquet names several splits, train, test"),
        (named("a.parquet"), ["d/a.parquet", "d/*.parquet"], r"names d/a.parquet twice"),
        (named("a.parquet"), [], r"names no file"),
        (lambda datasets: Path("d").mkdir(), "d", r"holds no file that ends in .*\. d holds nothing\."),
        (two({"x": [1, 2]}), "d", r"d/a.parquet and d/b.parquet do not .*'x' is .*float64.* and .*int64"),
        (two({"x": [1, 2]}, "csv"), "d", r"d/a.csv and d/b.csv do not .*'x' is .*float64.* and .*int64"),
        (two({"x": [1, 2]}, "jsonl"), ["d/a.jsonl", "d/b.jsonl"], r"d/a.jsonl and d/b.jsonl do not .*'x'"),
        (two({"z": [1, 2]}), "d", r"'z' is missing in the one and .*int64.* in the other"),
        (two({"z": [1, 2]}, "arrow"), "d", r"'z' is missing in the one"),
        (one_column_less, "d", r"'z' is .*int64.* in the one and missing in the other"),
        (other_classes, "d", r"'y' is ClassLabel\(names=\['cat', 'dog'\]\) in the one"),
        (one_is_broken, "d", r"d/b.parquet cannot be read: ArrowInvalid"),
        (one_that_is_no_arrow, "d", r"d/b.arrow cannot be read: ArrowInvalid"),
    ],
)
def test_what_is_not_one_dataset_is_refused(
    datasets: Any, make: Callable[[Any], None], path: str | Sequence[str], message: str
) -> None:
    make(datasets)
    with pytest.raises(mbgd.UsageError, match=message):
        numbers(path)


def test_images_of_several_files(datasets: Any) -> None:
    from io import BytesIO

    from PIL import Image

    for shard in range(3):
        files = []
        for row in range(2):
            file = BytesIO()
            Image.fromarray(np.full((4, 4, 3), 40 * shard + 20 * row, np.uint8)).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        table = datasets.Dataset.from_dict({"image": files, "label": [shard, shard]}, features)
        table.to_parquet(f"train-{shard}.parquet")
    data = huggingface_images("train-*.parquet", "train", "image", "label", size=4, mean=0.0, std=1.0)
    assert data is not None
    assert data.num_outputs == 3
    for index in range(6):
        pixels, target = data[index]
        assert round(float(pixels.mean()) * 255) == 20 * index
        assert int(target) == index // 2
    data = huggingface_images(["train-2.parquet", "train-0.parquet"], "train", "image", "label", size=4)
    assert data is not None
    assert [int(data[index][1]) for index in range(4)] == [2, 2, 0, 0]
