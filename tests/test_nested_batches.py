"""Batches of any nesting, from `gather`, from stacking and from data.collate: cast, moved and pinned at every level."""

import re
import shlex
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_configuration import composed
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import mbgd
from mbgd.batches.describing import content, form
from mbgd.batches.nested import leaves_of
from mbgd.batches.reading import read
from mbgd.batches.transfer import Transfer, cast
from mbgd.building.build import build_trainer, typed
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.explain.one_by_one import part

from processes import run_workers

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NUM_EXAMPLES = 13


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Frozen:
    inner: Any
    count: int = 3
    derived: str = field(init=False, default="kept")


@dataclass(slots=True)
class Slots:
    inner: Any


class Unknown:
    def __init__(self, values: Tensor) -> None:
        self.values = values


class Moving(Unknown):
    def to(self, device: torch.device) -> "Moving":
        return Moving(self.values.to(device))


def nested(leaf: Any) -> Any:
    return {"a": [(leaf, Pair(leaf, {"b": Frozen([leaf, "text", None])}))], "c": OrderedDict(d=Slots((leaf,)), e=2.5)}


def test_every_level_is_cast_and_moved() -> None:
    batch = cast(nested(torch.ones(2, 3, dtype=torch.float64)), torch.float32)
    moved = Transfer(torch.device("meta"))(batch)
    for given, device in ((batch, "cpu"), (moved, "meta")):
        tensors = [leaf for _, leaf in leaves_of(given) if isinstance(leaf, Tensor)]
        assert [(one.dtype, one.device.type) for one in tensors] == [(torch.float32, device)] * 4
        assert isinstance(given["a"][0], tuple)
        assert isinstance(given["a"][0][1], Pair)
        frozen, slots = given["a"][0][1].right["b"], given["c"]["d"]
        assert (type(frozen), frozen.count, frozen.derived) == (Frozen, 3, "kept")
        assert frozen.inner[1:] == ["text", None]
        assert type(slots) is Slots
        assert given["c"]["e"] == 2.5
    names = [name for name, _ in leaves_of(batch)]
    assert names[:3] == ["a[0][0]", "a[0][1].left", "a[0][1].right.b.inner[0]"]


def test_what_is_not_floating_keeps_its_dtype() -> None:
    kinds = [torch.uint8, torch.int64, torch.bool, torch.complex64]
    found = cast(nested([torch.ones(2, dtype=kind) for kind in kinds]), torch.float64)
    assert [leaf.dtype for _, leaf in leaves_of(found) if isinstance(leaf, Tensor)] == kinds * 4


def test_objects_that_move_themselves() -> None:
    packed = pack_sequence([torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)])
    batch = cast({"packed": packed, "own": [Moving(torch.ones(2))]}, torch.float32)
    assert isinstance(batch["packed"], PackedSequence)
    assert batch["packed"].data.dtype is torch.float32
    moved = Transfer(torch.device("meta"))(batch)
    assert moved["packed"].data.is_meta
    assert moved["packed"].batch_sizes.device.type == "cpu"  # as torch wants it
    assert moved["own"][0].values.is_meta


def test_unknown_objects_with_tensors_are_refused_and_others_stay() -> None:
    message = r"a batch holds a Unknown \(a\[0\]\[0\]\) with tensors \(values\), which the trainer can neither cast nor"
    with pytest.raises(mbgd.UsageError, match=message):
        cast(nested(Unknown(torch.ones(2))), torch.float32)
    plain = {"path": Path("x"), "array": np.ones(2), "kind": Unknown}
    assert cast(plain, torch.float32) == plain


def test_descriptions_see_into_dataclasses() -> None:
    """By which workers compare their examples."""
    one, other = Frozen([torch.zeros(2)]), Frozen([torch.ones(2)])
    assert content(one) != content(other)
    assert content(one) == content(Frozen([torch.zeros(2)]))
    assert "float32 (2,)" in form(one)
    assert content(pack_sequence([torch.zeros(2)])) != content(pack_sequence([torch.ones(2)]))


# Reading


INPUTS = torch.arange(NUM_EXAMPLES * 2, dtype=torch.float64).view(NUM_EXAMPLES, 2)


class Stacked:
    """Nested examples that torch stacks."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> Any:
        return {"x": [Pair(INPUTS[index], (INPUTS[index], index))]}


class Gathered(Stacked):
    def gather(self, indices: Tensor) -> Any:
        return {"x": [Pair(INPUTS[indices], (INPUTS[indices], indices))]}


class InDataclass(Stacked):
    def gather(self, indices: Tensor) -> Any:
        return Slots({"x": [Pair(INPUTS[indices], (INPUTS[indices], indices))]})


class WithTexts(Stacked):
    def gather(self, indices: Tensor) -> Any:
        return INPUTS[indices], ["text"] * len(indices)


def framed(examples: list[Any]) -> Slots:
    return Slots({"x": [Pair(*(torch.stack([of(one) for one in examples]) for of in (left, right)))]})


def left(example: Any) -> Tensor:
    values: Tensor = example["x"][0].left
    return values


def right(example: Any) -> Tensor:
    values: Tensor = example["x"][0].right[0]
    return values


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "collate"), [(Stacked(), None), (Gathered(), None), (InDataclass(), None), (Stacked(), framed)]
)
def test_batches_keep_their_form(dataset: Any, collate: Any, num_workers: int) -> None:
    parts = [np.arange(5), np.arange(5, 7), np.arange(7, 13)]
    how: dict[str, Any] = {"num_workers": num_workers, "device": CPU, "dtype": torch.float32, "collate": collate}
    for own_copies in (True, False):
        batches = list(read(dataset, parts, own_copies=own_copies, **how))
        for indices, batch in zip(parts, batches, strict=True):
            inner = batch.inner if isinstance(batch, Slots) else batch
            assert isinstance(batch, Slots) == (collate is framed or isinstance(dataset, InDataclass))
            (pair,) = inner["x"]
            assert isinstance(pair, Pair)
            assert pair.left.dtype is torch.float32
            assert torch.equal(pair.left, INPUTS[indices].float())
            second = part(inner, 1, 2)["x"][0]
            assert torch.equal(second.left, INPUTS[indices[1:2]].float())


def test_gather_must_give_tensors() -> None:
    with pytest.raises(mbgd.UsageError, match="gather returned a batch with a str; it must be tensors"):
        list(read(WithTexts(), [np.arange(5)], num_workers=0, device=CPU, dtype=torch.float32))


# Training


class Weighed(Stacked):
    def __getitem__(self, index: int) -> Any:
        return {"nodes": INPUTS[index] / 20, "near": INPUTS[index].sum() / 40, "name": str(index)}


def of_graphs(model: nn.Module, batch: Any) -> mbgd.PerExample:
    assert batch.names == [str(round(number)) for number in (batch.nodes[:, 0] * 10).tolist()]
    return mbgd.PerExample((model(batch.nodes).squeeze(1) - torch.stack(batch.edges["near"])).square())


def section(page: str, heading: str) -> list[str]:
    """The indented blocks under a heading."""
    text = (ROOT / "docs" / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [
        re.sub("^    ", "", block, flags=re.MULTILINE)
        for block in re.findall(r"(?:^    .*\n)+", text.replace("\\\n", " "), re.MULTILINE)
    ]


def documented_collate() -> Any:
    given: dict[str, Any] = {"dataclass": dataclass, "Tensor": Tensor, "torch": torch, "__name__": "my"}
    code = [one for one in section("bring_your_own.md", "The dataset") if "Graphs" in one]
    assert len("".join(code).splitlines()) <= 10
    exec("".join(code), given)
    return given["as_graphs"]


def train_graphs(workers: mbgd.Workers) -> tuple[Tensor, Tensor]:
    """The parameters, and those of plain torch on whole minibatches."""
    torch.manual_seed(0)
    model, plain = nn.Linear(2, 1), nn.Linear(2, 1).double()
    plain.load_state_dict(model.state_dict())
    data = mbgd.Data(train=Weighed(), collate=documented_collate())
    settings = mbgd.Settings(epochs=2, batch=mbgd.Batch(5, 2), precision="fp64")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = mbgd.Trainer(model, of_graphs, optimizer, data, settings, workers)
    by_hand = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(trainer.setup.num_steps):
        by_hand.zero_grad()
        rows = [Weighed()[index] for index in trainer.setup.loader.minibatch_indices(step).tolist()]
        inputs, targets = torch.stack([row["nodes"] for row in rows]), torch.stack([row["near"] for row in rows])
        (plain(inputs).squeeze(1) - targets).square().mean().backward()
        by_hand.step()
    trainer.fit()
    flat = nn.utils.parameters_to_vector
    return flat(model.parameters()).detach(), flat(plain.parameters()).detach()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_documented_dataclass_trains_as_in_plain_torch(num_workers: int) -> None:
    found, wanted = run_workers(train_graphs, num_workers)[0]
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)


# Bytes


IMAGES = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(24) % 3


class ByItems:
    """Without gather."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return IMAGES[index], TARGETS[index]


@pytest.mark.parametrize("dataset", [ByItems(), mbgd.InMemory(IMAGES, TARGETS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_stay_bytes_on_the_way(dataset: Any, dtype: torch.dtype) -> None:
    (batch,) = read(dataset, [np.arange(24)], num_workers=0, device=CPU, dtype=dtype)
    assert batch[0].dtype is torch.uint8
    assert torch.equal(batch[0], IMAGES)


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_the_documented_cast_gives_the_bits_of_images_cast_before(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (*code, command) = section("data.md", "Images as bytes")
    assert len("".join(code).splitlines()) <= 10
    (tmp_path / "my.py").write_text("import mbgd\n" + "".join(code))
    np.savez(tmp_path / "images.npz", inputs=IMAGES, targets=TARGETS, eval_inputs=IMAGES[:5], eval_targets=TARGETS[:5])
    before = IMAGES.double() / 255 if precision == "fp64" else IMAGES.float() / 255
    np.savez(tmp_path / "cast.npz", inputs=before, targets=TARGETS, eval_inputs=before[:5], eval_targets=TARGETS[:5])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my", raising=False)
    monkeypatch.chdir(tmp_path)
    more = ["epochs=2", "batch.size=7", f"precision={precision}"]
    found = []
    for overrides in (shlex.split(command)[2:], ["data=tensors", "data.path=cast.npz", "model=cnn"]):
        trainer = build_trainer(typed(composed(*overrides, *more)), mbgd.Workers())
        before_training = weights_sha256(trainer.setup.model)
        loss = trainer.fit().metrics["eval/loss"]
        assert weights_sha256(trainer.setup.model) != before_training
        found.append((weights_sha256(trainer.setup.model), loss))
    assert found[0] == found[1]


def looked_up(model: nn.Module, batch: Any) -> mbgd.PerExample:
    return mbgd.PerExample(model[1](model[0](batch["ids"]).mean(1)).squeeze(1))  # type: ignore[index]


class Ids(Stacked):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ids": torch.arange(3, dtype=torch.uint8), "mask": torch.ones(3, dtype=torch.uint8)}


def failing(model: nn.Module, batch: Any) -> mbgd.PerExample:
    raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("model", "objective", "data", "error", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()),
            mbgd.CrossEntropy(),
            ByItems(),
            mbgd.UsageError,
            r"fails on a batch with uint8 values \(\[0\]\): RuntimeError: .*\. Bytes come to the device as",
        ),
        (
            nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1)),
            looked_up,
            Ids(),
            mbgd.UsageError,
            r"\(ids, mask\).*ids\.long",
        ),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1)), failing, Ids(), RuntimeError, "something else"),
    ],
)
def test_a_model_that_fails_on_bytes(model: nn.Module, objective: Any, data: Any, error: Any, message: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        mbgd.Trainer(model, objective, optimizer, mbgd.Data(train=data), mbgd.Settings())
