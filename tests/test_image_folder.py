"""Images from folders: decoded, split, augmented by keys, and left out where broken, alike on any number of workers."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

import mbgd
from mbgd.batches.loader import Loader, augmentation_keys
from mbgd.batches.order import Order
from mbgd.batches.plan import Plan
from mbgd.data import ImageFolder
from mbgd.data.images import decode

from processes import run_workers

CROP, IMAGE_SIZE, SKIPPED = 2, 8, -100
ROOT = Path(__file__).parent.parent


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, name, count in (("train", "cat", 11), ("train", "dog", 14), ("val", "dog", 3)):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (9, 8 + number, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def image_folder(folder: Path, split: str = "train", **options: Any) -> ImageFolder:
    return ImageFolder(str(folder), split, **{"size": IMAGE_SIZE, "ignore_index": SKIPPED, **options})


def test_images_are_decoded_and_classes_numbered_alike_in_every_split(images: Path) -> None:
    train, val = image_folder(images), image_folder(images, "val", mean=0.0, std=1.0)
    assert (len(train), len(val), train.input_shape, train.num_outputs, val.num_outputs) == (25, 3, (3, 8, 8), 2, 2)
    assert train.targets.tolist() == [0] * 11 + [1] * 14
    assert val.targets.tolist() == [1] * 3
    with Image.open(images / "val/dog/0.png") as image:
        wanted = np.asarray(ImageOps.fit(image, (8, 8))).transpose(2, 0, 1) / 255
    assert torch.allclose(val[0][0], torch.from_numpy(wanted).float())
    assert image_folder(images, channels=1)[0][0].shape == (1, 8, 8)


def test_mean_and_std_of_each_channel(images: Path) -> None:
    raw, data = (
        image_folder(images, **options)[5][0]
        for options in ({"mean": 0.0, "std": 1.0}, {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 4]})
    )
    wanted = torch.stack([(raw[0] - 0.1) / 1, (raw[1] - 0.2) / 2, (raw[2] - 0.3) / 4])
    assert torch.allclose(data, wanted)


def test_a_photograph_stands_upright_and_deep_grey_keeps_its_scale(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[:, None].repeat(64, 1)  # black at the top
    turned = Image.fromarray(ramp).rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # of EXIF: turn it clockwise to see it as it was taken
    turned.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    wanted = decode(str(save(Image.fromarray(ramp), tmp_path / "plain.png")), 8, 1).astype(int)
    assert wanted[0].max() < 20
    assert wanted[-1].min() > 235
    for name in ("turned.jpg", "deep.png"):
        assert abs(decode(str(tmp_path / name), 8, 1) - wanted).max() <= 3, name


def test_numbers_of_unknown_range_are_no_grey_and_16_bits_in_any_format_are(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(64, 0)
    for array, reason in ((ramp.astype(np.int32), "32-bit"), (ramp.astype(np.float32), "floating-point")):
        with pytest.raises(ValueError, match=f"its pixels are {reason} numbers of unknown range"):
            decode(str(save(Image.fromarray(array), tmp_path / "unknown.tiff")), 64, 1)
    deep = ramp.astype(np.uint16) * 257
    (tmp_path / "deep.pgm").write_bytes(b"P5 64 64 65535\n" + deep.astype(">u2").tobytes())
    for name in ("deep.png", "deep.tiff"):
        save(Image.fromarray(deep), tmp_path / name)
    for name in ("deep.png", "deep.tiff", "deep.pgm"):
        assert (decode(str(tmp_path / name), 64, 1)[..., 0] == ramp).all(), name


def save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def test_a_large_photograph_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    photograph = Image.fromarray(random.integers(0, 256, (6, 9, 3), np.uint8)).resize(
        (900, 600), Image.Resampling.BICUBIC
    )
    fast = decode(str(save(photograph, tmp_path / "a.jpg")), 32, 3).astype(int)
    whole = np.asarray(ImageOps.fit(photograph, (32, 32))).astype(int)
    assert abs(fast - whole).mean() < 2


def test_a_held_out_share_follows_from_the_names(images: Path) -> None:
    def names(split: str) -> list[bytes]:
        return image_folder(images / "train", split, held_out=0.3)._names.tolist()

    train, val = names("train"), names("val")
    assert sorted(train + val) == sorted(image_folder(images)._names.tolist())
    assert 3 <= len(val) <= 12
    shutil.copy(images / "train/cat/1.png", images / "train/cat/new.png")
    (images / "train/dog/0.png").unlink()
    changed = {b"cat/new.png", b"dog/0.png"}
    assert set(names("val")) ^ set(val) <= changed
    assert set(names("train")) ^ set(train) <= changed
    assert image_folder(images / "train", "val", held_out=0.3).classes == ["cat", "dog"]
    with pytest.raises(mbgd.UsageError, match=r"no image .* for val with data.held_out=1e-09"):
        image_folder(images / "train", "val", held_out=1e-9)


def test_augmentation_is_a_crop_and_a_flip_that_follow_from_the_key(images: Path) -> None:
    plain = image_folder(images)
    assert torch.equal(plain.augmented(3, 7)[0], plain[3][0])
    data = image_folder(images, crop_padding=CROP, flip=True, mean=0.0)
    whole = F.pad(data[3][0], (CROP,) * 4)
    crops = [whole[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    wanted = {crop.numpy().tobytes() for image in crops for crop in (image, image.flip(2).contiguous())}
    got = [data.augmented(3, key)[0].contiguous().numpy().tobytes() for key in range(600)]
    assert set(got) == wanted
    assert len(wanted) == 50
    assert max(got.count(one) for one in wanted) < 35  # 12 are expected


def read_images(workers: mbgd.Workers, folder: Path, num_processes: int, first_step: int = 0) -> list[Any]:
    """Of every example up to the end of the second epoch: epoch, position, target, and the hash of its pixels."""
    data = mbgd.Data(train=image_folder(folder, crop_padding=CROP, flip=True), num_workers=num_processes)
    plan = Plan(num_examples=25, minibatch_size=10, num_workers=workers.num_workers, micro_batch_size=3)
    loader = Loader(data, plan, 3, workers, dtype=torch.float32, own_copies=True)
    seen = []
    for shard in loader.shards(first_step, 2 * plan.steps_per_epoch):
        for micro_batch, (pixels, targets) in shard.micro_batches:
            for row in range(micro_batch.size if not micro_batch.is_stand_in else 0):
                digest = hashlib.sha256(pixels[row].contiguous().numpy().tobytes()).hexdigest()
                seen.append((shard.minibatch.epoch, micro_batch.start + row, int(targets[row]), digest))
    return seen


STARTS = [(0, 0), (2, 0), (2, 1), (0, 4)]
"""Loader processes, first step: 3 steps make an epoch, so the last two begin in the middle of one."""


def read_images_again(workers: mbgd.Workers, folder: Path) -> list[list[Any]]:
    return [read_images(workers, folder, num_processes, first) for num_processes, first in STARTS]


def test_order_and_pixels_are_the_same_on_any_number_of_workers_and_loader_processes(images: Path) -> None:
    wanted = read_images(mbgd.Workers(), images, 0)
    assert [row[:2] for row in wanted] == [(epoch, position) for epoch in (0, 1) for position in range(25)]
    assert len({digest for *_, digest in wanted}) > 45  # each epoch cuts and mirrors anew
    for num_workers in (1, 3):
        of_workers = run_workers(read_images_again, num_workers, images)
        for (_, first), got in zip(STARTS, zip(*of_workers, strict=True), strict=True):
            start = first // 3 * 25 + first % 3 * 10
            assert sorted(row for of_worker in got for row in of_worker) == wanted[start:]
    data = image_folder(images, crop_padding=CROP, flip=True)
    order = Order(25, 3).indices(1, 0, 25)
    for (*_, target, digest), index, key in zip(wanted[25:], order, augmentation_keys(3, 1, order), strict=True):
        pixels, label = data.augmented(int(index), int(key))
        assert (target, digest) == (label, hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest())


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE_SIZE**2, 2)).double()


def train(
    workers: mbgd.Workers, folder: Path, on_error: str, num_processes: int
) -> tuple[list[Tensor], dict[str, float], int]:
    """Parameters after three steps over all 25 images, metrics, and how many images this worker left out."""
    data = mbgd.Data(
        train=image_folder(folder, on_error=on_error),
        evaluation=image_folder(folder, "val", on_error=on_error),
        num_workers=num_processes,
    )
    model = linear()
    settings = mbgd.Settings(steps=3, batch=mbgd.Batch(25, 4), precision=mbgd.Precision.fp64, log_every_steps=1)
    objective = mbgd.CrossEntropy(ignore_index=SKIPPED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    result = mbgd.Trainer(model, objective, optimizer, data, settings, workers).fit()
    return [p.detach() for p in model.parameters()], result.metrics, data.train.num_skipped


def train_twice(workers: mbgd.Workers, folder: Path) -> list[Any]:
    return [train(workers, folder, "skip", num_processes) for num_processes in (0, 2)]


def break_images(folder: Path) -> None:
    for name in ("train/cat/3.png", "train/dog/12.png", "val/dog/1.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])


def test_skipped_images_leave_the_gradient_that_the_others_have(images: Path) -> None:
    whole, val = image_folder(images), image_folder(images, "val")
    readable = [index for index, name in enumerate(whole._names) if name not in (b"cat/3.png", b"dog/12.png")]
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pixels, targets = (torch.stack(parts) for parts in zip(*(whole[index] for index in readable), strict=True))
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels.double()), targets)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        eval_loss = F.cross_entropy(model(torch.stack([val[0][0], val[2][0]]).double()), torch.tensor([1, 1]))
    break_images(images)
    for num_workers in (1, 3):
        for run in zip(*run_workers(train_twice, num_workers, images), strict=True):
            assert sum(num_skipped for *_, num_skipped in run) >= 2
            for parameters, metrics, _ in run:
                for got, wanted in zip(parameters, model.parameters(), strict=True):
                    assert (got - wanted.detach()).norm() <= 1e-12 * wanted.detach().norm()
                assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-12)
                assert metrics["eval/loss"] == pytest.approx(float(eval_loss), rel=1e-12)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_broken_image_ends_training_by_its_name(images: Path, num_processes: int) -> None:
    broken = images / "train/cat/3.png"
    broken.write_bytes(b"GIF89a")
    with pytest.raises(mbgd.UsageError, match=r"data.on_error=skip") as caught:
        train(mbgd.Workers(), images, "raise", num_processes)
    assert str(caught.value).startswith(f"{broken} is not an image that can be read (UnidentifiedImageError")


def test_a_broken_image_ends_every_worker(images: Path) -> None:
    """Only one of the two workers meets it, in a loader process, after the first step."""
    order = Order(25, 0).indices(0, 0, 25)
    broken = images / "train" / os.fsdecode(image_folder(images)._names[order[-1]])
    broken.unlink()
    broken.symlink_to("nowhere.png")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / "train.py"),
    ]
    command += ["data=image_folder", f"data.folder={images}", "batch.size=10", "run.dir=out", "tracking.quiet=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=images, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert f"error on worker 1: {broken} is not an image that can be read (FileNotFoundError" in done.stderr


def test_a_skipped_image_is_told_of_once(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    break_images(images)
    _, _, num_skipped = train(mbgd.Workers(), images, "skip", 2)
    told = [line for line in capfd.readouterr().err.splitlines() if "left out: " in line]
    assert num_skipped == 2
    assert sorted(line.split("left out: ")[1].split(" is not")[0] for line in told) == [
        str(images / name) for name in ("train/cat/3.png", "train/dog/12.png", "val/dog/1.png")
    ]
    (of_evaluation,) = [line for line in told if "/val/" in line]
    assert "This worker has left out 1 of 3 images." in of_evaluation


@pytest.mark.parametrize(
    "objective", [mbgd.CrossEntropy(), mbgd.CrossEntropy(ignore_index=-1), mbgd.MeanSquaredError()]
)
def test_an_objective_must_leave_out_what_is_skipped(images: Path, objective: Any) -> None:
    model = linear()
    whole, with_skipped = image_folder(images), image_folder(images, on_error="skip")
    for data in (mbgd.Data(train=with_skipped), mbgd.Data(train=whole, evaluation=with_skipped)):
        with pytest.raises(mbgd.UsageError, match=r"target -100, .*objective.ignore_index=-100"):
            mbgd.Trainer(model, objective, torch.optim.SGD(model.parameters()), data, mbgd.Settings())


class Jittered(mbgd.InMemory):
    """Examples in memory, moved by an amount that follows from the key."""

    def augmented(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self[index]
        return inputs + key % 7, targets


def test_examples_in_memory_can_be_augmented_too() -> None:
    data = mbgd.Data(train=Jittered(torch.zeros(20, 1, dtype=torch.float64), torch.arange(20)))
    plan = Plan(num_examples=20, minibatch_size=8, num_workers=1)
    loader = Loader(data, plan, 3, mbgd.Workers(), dtype=torch.float64, own_copies=False)
    read = [batch for shard in loader.shards(0, 3) for _, batch in shard.micro_batches]
    inputs, targets = (torch.cat(parts) for parts in zip(*read, strict=True))
    assert targets.tolist() == Order(20, 3).indices(0, 0, 20).tolist()
    assert inputs.squeeze(1).tolist() == (augmentation_keys(3, 0, targets.numpy()) % 7).tolist()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda folder: folder.rename(folder.parent / "other"), {}, r"train: there is no such folder"),
        (lambda folder: shutil.rmtree(folder / "val"), {"split": "val"}, r"data.evaluation=null"),
        (lambda folder: empty(folder / "train/cat"), {}, r"train/cat holds no image"),
        (lambda folder: empty(folder / "val/dog"), {"split": "val"}, r"val holds no image"),
        (lambda folder: [shutil.rmtree(path) for path in (folder / "train").iterdir()], {}, r"train holds no folders"),
        (lambda folder: (folder / "val/bird").mkdir(), {"split": "val"}, r"class bird, which the training"),
        (lambda folder: folder.rename(folder.parent / "other"), {}, r"data.held_out=0.1 to keep a tenth"),
        (lambda folder: None, {"split": "test"}, r"no split 'test'"),
        (lambda folder: None, {"held_out": 1.0}, r"data.held_out=1.0"),
        (lambda folder: shutil.rmtree(folder / "train/dog"), {"split": "val"}, r"class dog, which the training"),
        (lambda folder: None, {"mean": [0.1, 0.2]}, r"data.mean=\[0.1, 0.2\] for 3 channels"),
        (lambda folder: None, {"std": 0.0}, r"data.std=0.0"),
        (lambda folder: None, {"on_error": "skip", "ignore_index": None}, r"data.ignore_index=None.*ignore_index=-100"),
        (lambda folder: None, {"on_error": "skip", "ignore_index": 1}, r"ignore_index=1; .*no class \(0 to 1\)"),
        (lambda folder: None, {"channels": 4}, r"data.channels=4"),
        (lambda folder: None, {"on_error": "ignore"}, r"data.on_error=ignore"),
        (lambda folder: None, {"size": 0}, r"data.size=0"),
        (lambda folder: None, {"crop_padding": -1}, r"data.crop_padding=-1"),
    ],
)
def test_folders_of_images_that_cannot_be_used(
    images: Path, damage: Callable[[Path], Any], options: dict[str, Any], message: str
) -> None:
    damage(images)
    with pytest.raises(mbgd.UsageError, match=message):
        image_folder(images, **options)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
