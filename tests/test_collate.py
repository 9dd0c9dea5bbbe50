"""Examples of several lengths, made into batches by a function of one's own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_configuration import composed
from torch import Tensor, nn
from torch.utils.data import Dataset

import mbgd
from mbgd.batches.collating import collated
from mbgd.building.build import build_trainer, typed

from processes import run_workers

NUM_EXAMPLES, WIDTH = 23, 4


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences of 1 to 6 vectors, with a target for each vector."""

    def __init__(self, num_examples: int = NUM_EXAMPLES) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 7, (num_examples,), generator=generator).tolist()
        self._inputs = [torch.randn(length, WIDTH, generator=generator, dtype=torch.float64) for length in lengths]

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs = self._inputs[index]
        return {"inputs": inputs, "targets": inputs.sum(1).sin()}


def padded(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = {key: nn.utils.rnn.pad_sequence([one[key] for one in examples], batch_first=True) for key in examples[0]}
    lengths = torch.tensor([len(one["targets"]) for one in examples])
    return {**batch, "counts": (torch.arange(int(lengths.max())) < lengths[:, None]).double()}


def one_left_out(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return padded(examples[:-1])


def one_twice(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return padded([*examples, examples[0]])


def masked_at_random(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = padded(examples)
    return {**batch, "inputs": batch["inputs"] * torch.rand(()).round()}


def squared_error(model: nn.Module, batch: Any) -> mbgd.PerExample:
    losses = (model(batch["inputs"]).squeeze(-1) - batch["targets"]).square()
    return mbgd.PerExample(losses, batch["counts"])


def make_trainer(workers: mbgd.Workers, averaging: str, num_loaders: int, **data: Any) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1)
    given = {"train": Sequences(), "evaluation": Sequences(7), "collate": padded, **data}
    settings = mbgd.Settings(epochs=2, batch=mbgd.Batch(8, 3), precision="fp64", averaging=mbgd.Averaging(averaging))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mbgd.Trainer(model, squared_error, optimizer, mbgd.Data(num_workers=num_loaders, **given), settings, workers)


def train(workers: mbgd.Workers, averaging: str, num_loaders: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The parameters, those of plain torch on the same minibatches, and the evaluation."""
    trainer = make_trainer(workers, averaging, num_loaders)
    torch.manual_seed(0)
    plain, dataset = nn.Linear(WIDTH, 1).double(), Sequences()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(trainer.setup.num_steps):
        batch = padded([dataset[int(index)] for index in trainer.setup.loader.minibatch_indices(step)])
        terms = squared_error(plain, batch)
        optimizer.zero_grad()
        ((terms.losses * batch["counts"]).sum() / batch["counts"].sum()).backward()
        optimizer.step()
    metrics = trainer.fit().metrics
    flat = nn.utils.parameters_to_vector
    return flat(trainer.setup.model.parameters()).detach(), flat(plain.parameters()).detach(), metrics


@pytest.mark.parametrize(
    ("num_workers", "averaging", "num_loaders"),
    [(1, "auto", 0), (1, "auto", 2), (2, "ddp", 0), (2, "shared_memory", 1), (3, "reproducible", 0)],
)
def test_ragged_examples_train_as_in_plain_torch(num_workers: int, averaging: str, num_loaders: int) -> None:
    found, wanted, metrics = run_workers(train, num_workers, averaging, num_loaders)[0]
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
    assert metrics["eval/loss"] > 0


def test_a_configuration_names_the_function() -> None:
    sequences = {"train": "test_collate.Sequences", "objective": "test_collate.squared_error"}
    config = typed(
        composed(
            "data=own",
            f"data.train._target_={sequences['train']}",
            "data.collate={_target_:test_collate.padded}",
            "model=own",
            "model._target_=torch.nn.Linear",
            f"+model.in_features={WIDTH}",
            "+model.out_features=1",
            "objective=own",
            f"objective._target_={sequences['objective']}",
            "steps=2",
            "epochs=null",
            "batch.size=5",
        )
    )
    trainer = build_trainer(config, mbgd.Workers())
    assert trainer.setup.data.collate is not None
    assert trainer.fit().steps == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"collate": None}, r"inputs has shape \(\d, 4\) in one and \(\d, 4\) in another. Set data.collate"),
        (
            {"collate": one_left_out},
            r"objective returned losses of shape \(3, \d\) for 4 examples; expected one loss per",
        ),
        ({"collate": one_twice}, r"objective returned losses of shape \(5, \d\) for 4 examples; expected one loss per"),
        ({"collate": masked_at_random}, "data.collate draws random numbers"),
        ({"collate": 3}, "data.collate=3; it must be a function"),
        ({"train": mbgd.InMemory(torch.ones(3, 4), torch.ones(3))}, "data.collate with InMemory, whose gather"),
    ],
)
@pytest.mark.parametrize("num_loaders", [0, 1])
def test_mistakes_are_refused_before_training(data: dict[str, Any], message: str, num_loaders: int) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        make_trainer(mbgd.Workers(), "auto", num_loaders, **data)


def one_of_many_left_out(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return padded(examples[:-1] if len(examples) > 4 else examples)


def test_a_function_that_leaves_out_examples_of_larger_batches_is_refused_at_the_step() -> None:
    """Larger than those that are tried before training."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = mbgd.Data(train=Sequences(), collate=one_of_many_left_out)
    settings = mbgd.Settings(batch=mbgd.Batch(8), precision="fp64")
    trainer = mbgd.Trainer(model, squared_error, optimizer, data, settings)
    before = model.weight.detach().clone()
    with pytest.raises(
        mbgd.UsageError, match=r"losses of shape \(7, \d\) for 8 examples; expected one loss per example"
    ):
        trainer.fit()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"a": 1.0}, {"b": 1.0}], "an example has the keys a in one and b in another"),
        (
            [{"a": {"b": torch.ones(2)}}, {"a": {"b": torch.ones(3)}}],
            r"a.b has shape \(2,\) in one and \(3,\) in another",
        ),
        ([(1, torch.ones(2)), (1, torch.ones(3))], r"\[1\] has shape \(2,\) in one and \(3,\) in another"),
        ([[1, 2], [1]], "an example has 2 values in one and 1 in another"),
        ([{"a": (1, None)}] * 2, r"a\[1\] is a NoneType. Set data.collate to a function that makes"),
        ([[1, object()]], r"\[1\] is a object"),
        ([torch.ones(2), "text"], r"an example has shape \(2,\) in one and \(\) in another"),
    ],
)
def test_what_cannot_be_stacked_is_named(examples: list[Any], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        collated(examples, None)


class Gathered:
    """Examples in memory under names, nested."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._inputs = torch.randn(NUM_EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("gather is there")

    def gather(self, indices: Tensor) -> Any:
        inputs = self._inputs[indices]
        return {"inputs": inputs, "of_targets": [inputs.sum(1), (inputs.prod(1),)]}


def squared_error_of_names(model: nn.Module, batch: Any) -> mbgd.PerExample:
    total, (product,) = batch["of_targets"]
    return mbgd.PerExample((model(batch["inputs"]).squeeze(-1) - total - product).square())


def train_gathered(workers: mbgd.Workers) -> tuple[Tensor, Tensor]:
    """The parameters, and those of plain torch on whole minibatches."""
    torch.manual_seed(0)
    model, plain = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1).double()
    plain.load_state_dict(model.state_dict())
    settings = mbgd.Settings(epochs=2, batch=mbgd.Batch(8, 3), precision="fp64")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = mbgd.Trainer(model, squared_error_of_names, optimizer, mbgd.Data(train=Gathered()), settings, workers)
    by_hand = torch.optim.SGD(plain.parameters(), lr=0.01)
    for step in range(trainer.setup.num_steps):
        by_hand.zero_grad()
        batch = Gathered().gather(torch.from_numpy(trainer.setup.loader.minibatch_indices(step)))
        squared_error_of_names(plain, batch).losses.mean().backward()
        by_hand.step()
    trainer.fit()
    flat = nn.utils.parameters_to_vector
    return flat(model.parameters()).detach(), flat(plain.parameters()).detach()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_gather_may_give_nested_dicts(num_workers: int) -> None:
    found, wanted = run_workers(train_gathered, num_workers)[0]
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
