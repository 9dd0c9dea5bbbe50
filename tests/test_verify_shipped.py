"""verify on every shipped model with every shipped dataset that it takes: right, but for BatchNorm, which is named."""

import os
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mbgd import Workers
from mbgd.building.build import typed
from mbgd.building.composing import compose
from mbgd.verify.verifying import verify

from processes import run_workers

CONF = Path(__file__).parent.parent / "conf"
NUM_EXAMPLES, NUM_CLASSES, NUM_TOKENS, CONTEXT = 24, 3, 50, 8

SMALL = {
    "linear": ["model=linear"],
    "mlp": ["model=mlp", "model.hidden=[8]"],
    "cnn": ["model=cnn", "model.channels=[4,8]", "model.hidden=8"],
    "resnet": ["model=resnet", "model.depth=8", "model.width=4"],
    "gpt": ["model=gpt", "model.num_layers=1", "model.num_heads=2", "model.width=8"],
}
OF_IMAGES = ("linear", "mlp", "cnn", "resnet")
TAKEN_BY = {
    "digits": OF_IMAGES,
    "fashion_mnist": OF_IMAGES,
    "regression": ("linear", "mlp"),
    "tensors": (*OF_IMAGES, "gpt"),
    "text": ("gpt",),
    "tokens": ("gpt",),
    "image_folder": OF_IMAGES,
    "huggingface": (*OF_IMAGES, "gpt"),
    "huggingface_images": OF_IMAGES,
}
"""The models that take what this data gives; the others are refused or need other inputs."""


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def labels() -> NDArray[np.int64]:
    return np.arange(NUM_EXAMPLES) % NUM_CLASSES


def images(channels: int = 3) -> NDArray[np.uint8]:
    shape = (NUM_EXAMPLES, 28, 28, channels)
    return random().integers(0, 256, shape, np.uint8).squeeze()


def ids(*shape: int) -> NDArray[np.int64]:
    return random().integers(0, NUM_TOKENS, shape)


# A dataset of each kind, and the overrides that a model takes it by


def digits(folder: Path, model: str) -> list[str]:
    return []


def fashion_mnist(folder: Path, model: str) -> list[str]:
    """A few images in files of the packaged names: all 60,000 would take longer to read than everything else here."""
    for split in ("train", "t10k"):
        for name, values in (("images-idx3", images(1)), ("labels-idx1", labels().astype(np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (folder / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())
    return [f"data.folder={folder}"]


def regression(folder: Path, model: str) -> list[str]:
    return [f"data.num_examples={NUM_EXAMPLES}", "objective=mse"]


def tensors(folder: Path, model: str) -> list[str]:
    pixels = random().normal(size=(NUM_EXAMPLES, 1, 8, 8))
    np.savez(folder / "images.npz", inputs=pixels, targets=labels())
    tokens = ids(NUM_EXAMPLES, CONTEXT + 1)
    np.savez(folder / "tokens.npz", inputs=tokens[:, :-1], targets=tokens[:, 1:])
    return [f"data.path={folder / ('tokens.npz' if model == 'gpt' else 'images.npz')}", "data.evaluation=null"]


def text(folder: Path, model: str) -> list[str]:
    for length in (3, 11, 60, 200):  # documents of uneven length: windows with targets of weight 0
        (folder / f"{length}.txt").write_bytes(ids(length).astype(np.uint8).tobytes())
    return [f"data.path={folder}", f"data.context={CONTEXT}", "data.evaluation_share=0"]


def tokens(folder: Path, model: str) -> list[str]:
    for split in ("train", "val"):
        ids(203).astype(np.uint16).tofile(folder / f"{split}.bin")
    return [f"data.folder={folder}", f"data.vocabulary={NUM_TOKENS}", f"data.context={CONTEXT}"]


def image_folder(folder: Path, model: str) -> list[str]:
    """Two images of the first minibatch cannot be read: weight 0. The cnn reads its images in a loader process."""
    for split in ("train", "val"):
        for number, (pixels, label) in enumerate(zip(images(), labels(), strict=True)):
            file = folder / split / str(label) / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"no image" if split == "train" and number in (0, 6) else png(pixels))
    unread = ["data.on_error=skip", "data.ignore_index=-100", "data.shuffle=false"]
    return [f"data.folder={folder}", "data.size=8", f"data.num_workers={int(model == 'cnn')}", *unread]


def huggingface(folder: Path, model: str) -> list[str]:
    """Two columns of numbers for the linear model, one of images or tokens for the others."""
    import datasets

    tokens = ids(NUM_EXAMPLES, CONTEXT + 1)
    columns = {
        **{name: random().normal(size=NUM_EXAMPLES).tolist() for name in ("height", "width")},
        "pixels": random().normal(size=(NUM_EXAMPLES, 1, 8, 8)).tolist(),
        "label": labels().tolist(),
        "tokens": tokens[:, :-1].tolist(),
        "next": tokens[:, 1:].tolist(),
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "own.parquet")
    inputs = {"linear": "[height,width]", "gpt": "tokens"}.get(model, "pixels")
    targets = "next" if model == "gpt" else "label"
    return [f"data.path={folder / 'own.parquet'}", f"data.inputs={inputs}", f"data.targets={targets}"]


def huggingface_images(folder: Path, model: str) -> list[str]:
    import datasets

    columns = {"image": [{"bytes": png(one), "path": None} for one in images()], "label": labels().tolist()}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict(columns, features).save_to_disk(folder / "own")
    return [f"data.path={folder / 'own'}", "data.size=8", "data.num_workers=0"]


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


WRITERS: dict[str, Callable[[Path, str], list[str]]] = {
    writer.__name__: writer for writer in (digits, fashion_mnist, regression, tensors, text, tokens, image_folder)
}
WRITERS_OF_DATASETS = {writer.__name__: writer for writer in (huggingface, huggingface_images)}


def verified(workers: Workers, cache: Path, cases: Mapping[str, list[str]]) -> dict[str, Any]:
    os.environ["XDG_CACHE_HOME"] = os.environ["HF_DATASETS_CACHE"] = str(cache)
    results = {}
    for name, overrides in cases.items():
        torch.use_deterministic_algorithms(False)
        results[name] = verify(typed(compose(overrides)), workers, 1, seconds=0.05)
    return results


def check(folder: Path, writers: Mapping[str, Callable[[Path, str], list[str]]]) -> None:
    cases = {}
    for data, writer in writers.items():
        (folder / data).mkdir()
        for model in TAKEN_BY[data]:
            cases[f"{model} on {data}"] = [f"data={data}", *SMALL[model], *writer(folder / data, model), "batch.size=7"]
    results = run_workers(verified, 2, folder / "cache", cases, timeout_seconds=400)[0]
    for name, result in results.items():
        kinds = [finding["kind"] for finding in result["findings"]]
        verdicts = [comparison["verdict"] for comparison in result["comparisons"]]
        if name.startswith("resnet"):
            assert (result["verdict"], kinds) == ("WRONG", ["batch_norm", "moving_buffers"]), (name, result)
            assert "features.1, features.3.first_norm" in result["findings"][0]["what"]
        else:
            assert (verdicts, kinds) == (["exact", "within rounding"], []), (name, result)


def test_every_pair(tmp_path: Path) -> None:
    check(tmp_path, WRITERS)


def test_every_pair_with_hugging_faces_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    check(tmp_path, WRITERS_OF_DATASETS)


def test_all_that_is_shipped_is_tried() -> None:
    models, data = ({path.stem for path in CONF.glob(f"{group}/*.yaml")} - {"own"} for group in ("model", "data"))
    assert set(SMALL) == {model for models in TAKEN_BY.values() for model in models} == models
    assert set(TAKEN_BY) == set(WRITERS) | set(WRITERS_OF_DATASETS) == data
