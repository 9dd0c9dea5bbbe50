"""Columns of numbers and of images from what Hugging Face's `datasets` saves or reads."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mbgd
from mbgd.batches.loader import read
from mbgd.data import huggingface, huggingface_images

ROWS = {
    "a": [0.1, 2.0, 3.0, 4.0],
    "b": [1, 2, 3, 4],
    "pixels": [[[i, 1], [2, 3]] for i in range(4)],
    "label": [0, 1, 2, 0],
}


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


@pytest.mark.parametrize("kind", ["folder", "folder with splits", "parquet", "json", "csv"])
def test_columns_of_what_datasets_reads(datasets: Any, tmp_path: Path, kind: str) -> None:
    rows = {name: values for name, values in ROWS.items() if kind != "csv" or name != "pixels"}
    table = datasets.Dataset.from_dict(rows)
    path = tmp_path / "own"
    if kind == "folder":
        table.shuffle(seed=1).sort("b").save_to_disk(path)
    elif kind == "folder with splits":
        datasets.DatasetDict(train=table.select([0]), test=table).save_to_disk(path)
    else:
        path = path.with_suffix(f".{kind}")
        getattr(table, f"to_{kind}")(path)
    data = huggingface(str(path), "test", ["a", "b"], "label")
    assert data is not None
    inputs, targets = data.gather(torch.tensor([2, 0, 2]))
    assert (inputs.dtype, targets.dtype, len(data), data.num_outputs) == (torch.float64, torch.int64, 4, 3)
    assert (inputs.tolist(), targets.tolist()) == ([[3.0, 3.0], [0.1, 1.0], [3.0, 3.0]], [2, 0, 2])
    assert torch.equal(data[2][0], inputs[0])
    if kind != "csv":
        images = huggingface(str(path), "test", "pixels", "a")
        assert images is not None
        assert (images.input_shape, images.num_outputs, images.targets.dtype) == ((2, 2), 1, torch.float64)
        assert images[3][0].tolist() == [[3, 1], [2, 3]]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"targets": "labels"}, r"no column 'labels'; it has a, b, pixels, label"),
        (ROWS, {"inputs": ["a", "pixels"]}, r"'pixels' holds lists"),
        (ROWS | {"a": ["x"] * 4}, {}, r"column 'a' is of type .*string; .*data=text"),
        (ROWS | {"a": [[1], [1, 2], [], [3]]}, {}, r"lists of 0 to 2 values"),
        (ROWS | {"a": [1.0, None, 2.0, 3.0]}, {}, r"1 missing values"),
        (ROWS, {"path": "none.csv"}, r"none.csv: there is no such file.*not downloaded"),
        (ROWS, {"path": "own.txt"}, r"must end in .parquet"),
        (ROWS, {"path": "broken.parquet"}, r"broken.parquet cannot be read"),
        (ROWS, {"path": "."}, r"cannot be read"),
    ],
)
def test_columns_that_cannot_be_used(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_dict(rows).to_parquet("own.parquet")
    Path("broken.parquet").write_bytes(b"PAR1abc")
    Path("own.txt").touch()
    with pytest.raises(mbgd.UsageError, match=message):
        huggingface(**{"path": "own.parquet", "split": "train", "inputs": "a", "targets": "label", **options})


@pytest.mark.parametrize("kind", ["folder", "parquet", "bytes"])
def test_a_column_of_images(datasets: Any, tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(4)]
    files = [png(one) for one in pixels]
    label = datasets.ClassLabel(names=["cat", "dog", "owl"])
    features = datasets.Features(image=datasets.Value("binary") if kind == "bytes" else datasets.Image(), label=label)
    table = datasets.Dataset.from_dict(
        {"image": files if kind == "bytes" else [{"bytes": one, "path": None} for one in files], "label": [0, 1, 1, 0]},
        features,
    )
    path = tmp_path / ("own" if kind == "folder" else "own.parquet")
    table.save_to_disk(path) if kind == "folder" else table.to_parquet(path)
    data = huggingface_images(str(path), "train", "image", "label", size=8, mean=0.0, std=1.0)
    assert data is not None
    assert (len(data), data.input_shape, data.num_outputs) == (4, (3, 8, 8), 3)
    wanted = np.stack(pixels)[[3, 1]].transpose(0, 3, 1, 2) / 255
    for num_workers in (0, 1):
        where = {"num_workers": num_workers, "device": torch.device("cpu"), "dtype": torch.float64}
        [(inputs, targets)] = read(data, [np.array([3, 1])], **where)
        assert np.allclose(inputs.numpy(), wanted, atol=1e-7)
        assert targets.tolist() == [0, 1]


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_columns_of_images_that_cannot_be_used(datasets: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "own.parquet")
    datasets.Dataset.from_dict({"image": [b"no image"], "label": [0], "share": [0.5]}).to_parquet(path)
    for inputs, targets, message in (
        ("label", "label", r"column 'label' is of type int64; it must hold images"),
        ("picture", "label", r"no column 'picture'"),
        ("image", "share", r"column 'share' must hold a class number"),
    ):
        with pytest.raises(mbgd.UsageError, match=message):
            huggingface_images(path, "train", inputs, targets, size=8)
    assert huggingface_images(None, "train", "image", "label", size=8) is None
    data = huggingface_images(path, "train", "image", "label", size=8)
    assert data is not None
    with pytest.raises(mbgd.UsageError, match=r"own.parquet: row 0 is not an image that can be read"):
        data[0]
