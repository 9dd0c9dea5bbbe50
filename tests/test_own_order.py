"""Orders beside the plain one: drawn by weights, and sorted by length within windows."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_collate import NUM_EXAMPLES, WIDTH, Sequences, padded, squared_error
from test_configuration import composed
from test_order import chi_square
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import I64, Order
from mbgd.building.build import build_trainer, typed
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.data import digits

from processes import run_workers

ROOT = Path(__file__).parent.parent
SIZE, NUM_EPOCHS = 8, 2


def drawn(weights: Any, epoch: int, count: int, seed: int = 3) -> I64:
    """The first examples of an epoch, whatever its length."""
    return mbgd.WeightedOrder(weights).of(weights).at_positions(seed, 1).at(epoch, np.arange(count))


def sorted_by(lengths: Any, epoch: int, size: int = 32, window: int | None = None, seed: int = 3) -> I64:
    """A whole epoch."""
    order = mbgd.BucketedOrder(lengths, window).of(lengths).at_positions(seed, size)
    return order.at(epoch, np.arange(len(lengths)))


# The orders alone


@pytest.mark.parametrize("epoch", [0, 7])
def test_examples_are_drawn_in_proportion_to_their_weights(epoch: int) -> None:
    weights, count = np.arange(100.0), 100_000
    counts = np.bincount(drawn(weights, epoch, count), minlength=100)
    assert counts[0] == 0
    expected = count * weights[1:] / weights.sum()
    # 98 degrees of freedom: exceeded about once in 10,000 orders that are truly random.
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 157


@pytest.mark.parametrize("lag", [1, 2, 8, 1000])
def test_draws_do_not_depend_on_those_before(lag: int) -> None:
    found = drawn(np.ones(12), 0, 100_000 + lag)
    pairs = found[:-lag] * 12 + found[lag:]
    # 143 degrees of freedom: exceeded about once in 10,000.
    assert chi_square(np.bincount(pairs, minlength=144), len(pairs) / 144) < 213


def test_epochs_and_seeds_draw_for_themselves() -> None:
    weights = np.ones(1000)
    orders = [drawn(weights, epoch, 1000, seed) for seed in range(3) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.02


@pytest.mark.parametrize("weights", [[0.0, 5.0, 0.0], [0.0, 1e308, 1e308, 0.0], [1e-300, 0.0, 1e-300], [0, 1, 0]])
def test_weight_0_is_never_drawn(weights: list[float]) -> None:
    assert set(drawn(weights, 0, 5000).tolist()) == set(np.flatnonzero(weights).tolist())


def test_weights_may_have_any_scale() -> None:
    weights = np.array([1.0, 2.0, 5.0])
    assert np.array_equal(drawn(weights, 1, 500), drawn(weights * 2.0**900, 1, 500))


@pytest.mark.parametrize("num_examples", [1, 31, 32, 33, 1000, 1037])
@pytest.mark.parametrize("window", [None, 1, 3, 10_000])
def test_sorted_by_length_every_example_comes_once(num_examples: int, window: int | None) -> None:
    lengths = np.arange(num_examples) % 7
    for epoch in range(3):
        assert np.array_equal(np.sort(sorted_by(lengths, epoch, window=window)), np.arange(num_examples))


def padded_share(lengths: I64, order: I64, size: int) -> float:
    """The tokens of the padded minibatches, in tokens of the examples."""
    parts = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    return float(sum(part.max() * len(part) for part in parts) / lengths.sum())


def test_little_is_padded() -> None:
    """The numbers of docs/data.md."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 10_000).astype(np.int64)
    plain = padded_share(lengths, Order(10_000, seed=3).indices(0, 0, 10_000), 32)
    shares = [padded_share(lengths, sorted_by(lengths, epoch, window=50), 32) for epoch in range(3)]
    assert plain > 5
    assert max(shares) < 1.25
    # What is padded at all: 430 % of the examples' tokens become about 21 %.
    assert (plain - 1) / (np.mean(shares) - 1) > 18
    micro_batches = padded_share(lengths, sorted_by(lengths, 0, window=50), 8)
    assert micro_batches < max(shares)


def test_lengths_do_not_come_sorted_and_the_short_minibatch_is_of_any_length() -> None:
    lengths = np.random.default_rng(0).integers(0, 1000, 32 * 40 + 5)
    of_last, correlations = [], []
    for epoch in range(60):
        order = sorted_by(lengths, epoch, window=100)
        means = lengths[order][: 32 * 40].reshape(40, 32).mean(1)
        correlations.append(np.corrcoef(np.arange(40), means)[0, 1])
        of_last.append(lengths[order[-5:]].mean())
        assert (np.diff(lengths[order[:32]]) >= 0).all()
        assert np.ptp(lengths[order[-5:]]) < 60
    assert abs(np.mean(correlations)) < 0.1  # 60 coefficients of 0.16 each: 0.02
    assert min(of_last) < 200
    assert max(of_last) > 800
    assert 350 < np.mean(of_last) < 650


def test_every_epoch_has_other_minibatches() -> None:
    """Also with lengths that are all different, and windows that are not given."""
    lengths = np.random.default_rng(0).permutation(1000)
    of_epochs = [{frozenset(part) for part in np.split(sorted_by(lengths, epoch, 10), 100)} for epoch in range(2)]
    assert len(of_epochs[0] & of_epochs[1]) < 5


@pytest.mark.parametrize("kind", [mbgd.WeightedOrder, mbgd.BucketedOrder])
def test_any_positions_at_any_time_give_the_same(kind: Any) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 1037)
    whole = {epoch: kind(lengths).of(lengths).at_positions(5, 32).at(epoch, np.arange(1037)) for epoch in (0, 1)}
    order = kind(lengths).of(lengths).at_positions(5, 32)
    rng = np.random.default_rng(1)
    for _ in range(30):
        epoch, positions = int(rng.integers(2)), rng.integers(0, 1037, (3, 50))
        given = positions.copy()
        assert np.array_equal(order.at(epoch, positions), whole[epoch][positions])
        assert np.array_equal(positions, given)


def test_the_orders_are_the_same_for_ever() -> None:
    """Otherwise no older run could be resumed."""
    assert drawn([1, 2, 3, 0, 4], 2, 12).tolist() == GOLDEN_DRAWS
    assert sorted_by([3, 1, 2, 9, 8, 7, 4, 5, 6, 0], 2, 3, 2).tolist() == GOLDEN_BUCKETS


GOLDEN_DRAWS = [2, 1, 4, 2, 4, 2, 1, 2, 4, 2, 2, 4]
GOLDEN_BUCKETS = [7, 5, 4, 9, 2, 0, 1, 6, 8, 3]


# Training with them


class Lengthy(Sequences):
    """With the number of vectors of each."""

    @property
    def lengths(self) -> list[int]:
        return [len(one) for one in self._inputs]


def by_sum(dataset: Any) -> Tensor:
    return torch.stack([dataset[index]["inputs"].sum().abs() for index in range(len(dataset))])


ORDERS: dict[str, Any] = {
    "drawn": mbgd.WeightedOrder(by_sum),
    "sorted": mbgd.BucketedOrder("lengths", window=2),
    "plain": None,
}


def make_trainer(workers: mbgd.Workers, averaging: str = "auto", num_loaders: int = 0, **data: Any) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    given = {"train": Lengthy(), "collate": padded, "num_workers": num_loaders, **data}
    settings = mbgd.Settings(
        epochs=NUM_EPOCHS, batch=mbgd.Batch(SIZE, 3), precision="fp64", averaging=mbgd.Averaging(averaging)
    )
    return mbgd.Trainer(model, squared_error, optimizer, mbgd.Data(**given), settings, workers)


def in_plain_torch(minibatches: list[list[int]], *, shards: int = 1) -> Tensor:
    """The parameters; with several shards the mean of their means, which must differ."""
    torch.manual_seed(0)
    model, dataset = nn.Linear(WIDTH, 1).double(), Lengthy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for minibatch in minibatches:
        optimizer.zero_grad()
        for part in np.array_split(minibatch, min(shards, len(minibatch))):
            batch = padded([dataset[int(index)] for index in part])
            error = (model(batch["inputs"]).squeeze(-1) - batch["targets"]).square() * batch["counts"]
            (error.sum() / batch["counts"].sum() / min(shards, len(minibatch))).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def train(
    workers: mbgd.Workers, order: str, averaging: str, num_loaders: int
) -> tuple[Tensor, list[list[int]], list[list[int]], str]:
    """The parameters, the examples of each minibatch, those that this worker computed, and the hash of all weights."""
    trainer = make_trainer(workers, averaging, num_loaders, order=ORDERS[order])
    steps = range(trainer.setup.num_steps)
    minibatches = [trainer.setup.loader.minibatch_indices(step).tolist() for step in steps]
    inputs = [one["inputs"] for one in Lengthy()]  # type: ignore[attr-defined]
    computed = []
    for shard in trainer.setup.loader.shards(0, len(steps)):
        rows = [row for one in shard.micro_batches if not one.micro_batch.is_stand_in for row in one.batch["inputs"]]
        computed.append([next(i for i, x in enumerate(inputs) if torch.equal(x, row[: len(x)])) for row in rows])
    trainer.fit()
    found = nn.utils.parameters_to_vector(trainer.setup.model.parameters()).detach()
    return found, minibatches, computed, trainer.weights_sha256()


@pytest.mark.parametrize("order", ["drawn", "sorted"])
@pytest.mark.parametrize(
    ("num_workers", "averaging", "num_loaders"),
    [(1, "auto", 0), (2, "ddp", 0), (2, "shared_memory", 1), (3, "reproducible", 0), (3, "ddp", 0)],
)
def test_training_is_that_of_plain_torch(order: str, num_workers: int, averaging: str, num_loaders: int) -> None:
    of_workers = run_workers(train, num_workers, order, averaging, num_loaders)
    found, minibatches, _, _ = of_workers[0]
    wanted = in_plain_torch(minibatches)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
    # Teeth: neither the mean of means nor another order would do.
    assert not torch.allclose(in_plain_torch(minibatches, shards=2), wanted, rtol=1e-4)
    for step, minibatch in enumerate(minibatches):
        assert [index for one in of_workers for index in one[2][step]] == minibatch
    assert minibatches == train(mbgd.Workers(), order, "auto", 0)[1]
    assert minibatches != train(mbgd.Workers(), "plain", "auto", 0)[1]
    every = sorted(index for minibatch in minibatches for index in minibatch)
    assert (every == sorted([*range(NUM_EXAMPLES)] * NUM_EPOCHS)) == (order == "sorted")


def whole_numbers(workers: mbgd.Workers) -> tuple[Tensor, list[list[int]]]:
    """A problem whose every sum is exact in float32."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
    inputs = torch.randint(-4, 5, (64, 3), generator=torch.Generator().manual_seed(0)).float()
    data = mbgd.Data(train=mbgd.InMemory(inputs, torch.zeros(64, 1)), order=mbgd.WeightedOrder(torch.arange(64)))
    settings = mbgd.Settings(steps=2, batch=mbgd.Batch(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = mbgd.Trainer(model, linear_loss, optimizer, data, settings, workers)
    trainer.fit()
    minibatches = [trainer.setup.loader.minibatch_indices(step).tolist() for step in range(2)]
    wanted = torch.tensor([[1.0, -2.0, 3.0]])
    for minibatch in minibatches:
        wanted = wanted - inputs[minibatch].sum(0) / 16
    assert torch.equal(model.weight.detach(), wanted)
    return model.weight.detach(), minibatches


def linear_loss(model: nn.Module, batch: Any) -> mbgd.PerExample:
    return mbgd.PerExample(model(batch[0]).squeeze(1))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_whole_numbers_give_equal_bits(num_workers: int) -> None:
    found, minibatches = run_workers(whole_numbers, num_workers)[0]
    assert not torch.equal(found, torch.tensor([[1.0, -2.0, 3.0]]))
    assert any(len(set(minibatch)) < len(minibatch) for minibatch in minibatches)  # drawn with replacement


class Stop:
    def agreed(self, step: int) -> bool:
        return step == 2  # of 3 of the first epoch


def stopped(workers: mbgd.Workers, order: str) -> Snapshot:
    trainer = make_trainer(workers, "reproducible", order=ORDERS[order])
    with pytest.raises(mbgd.errors.Preempted):
        trainer.fit(stop=Stop())
    return trainer.snapshot()


def gone_on(workers: mbgd.Workers, order: str, snapshot: Snapshot) -> str:
    trainer = make_trainer(workers, "reproducible", order=ORDERS[order])
    trainer.restore(snapshot)
    trainer.fit()
    return weights_sha256(trainer.setup.model)


@pytest.mark.parametrize("order", ["drawn", "sorted"])
def test_a_run_goes_on_in_the_middle_of_an_epoch_on_other_workers(order: str) -> None:
    snapshot = run_workers(stopped, 2, order)[0]
    assert snapshot.step == 2
    uninterrupted = train(mbgd.Workers(), order, "reproducible", 0)[3]
    assert run_workers(gone_on, 3, order, snapshot) == [uninterrupted] * 3
    plain = train(mbgd.Workers(), "plain", "reproducible", 0)[3]
    assert uninterrupted != plain


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (mbgd.WeightedOrder(np.ones(NUM_EXAMPLES)), "data.order: WeightedOrder with weights .* before, WeightedOrder"),
        (mbgd.BucketedOrder(), "data.order: WeightedOrder with weights .* before, BucketedOrder"),
        (None, "data.order: WeightedOrder with weights .* before, None now"),
    ],
)
def test_a_state_of_other_weights_is_refused(order: Any, message: str) -> None:
    snapshot = make_trainer(mbgd.Workers(), order=ORDERS["drawn"]).snapshot()
    make_trainer(mbgd.Workers(), order=ORDERS["drawn"]).restore(snapshot)
    with pytest.raises(mbgd.UsageError, match=message):
        make_trainer(mbgd.Workers(), order=order).restore(snapshot)


class Augmented(mbgd.InMemory):
    """Each example is its number and its key."""

    def augmented(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([float(index), key % 1000]), torch.zeros(1)


def augmentations(workers: mbgd.Workers) -> list[tuple[float, float]]:
    data = mbgd.Data(
        train=Augmented(torch.zeros(6, 2), torch.zeros(6, 1)), order=mbgd.WeightedOrder([1, 1, 1, 1, 9, 9])
    )
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    trainer = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, mbgd.Settings(batch=mbgd.Batch(6)), workers)
    (shard,) = trainer.setup.loader.shards(0, 1)
    return [(float(row[0]), float(row[1])) for one in shard.micro_batches for row in one.batch[0]]


def test_an_example_that_is_drawn_twice_is_augmented_twice() -> None:
    alone = augmentations(mbgd.Workers())
    assert len({index for index, _ in alone}) < 6
    assert len({key for _, key in alone}) == 6
    together = run_workers(augmentations, 2)
    assert together[0] + together[1] == alone


# Mistakes


def refused(workers: mbgd.Workers, order: Any) -> str:
    with pytest.raises(mbgd.UsageError) as caught:
        make_trainer(workers, order=order)
    return str(caught.value)


def weights(**at: float) -> Any:
    values = np.ones(NUM_EXAMPLES)
    for name, value in at.items():
        values[int(name[1:])] = value
    return mbgd.WeightedOrder(values)


def lengths(values: Any) -> mbgd.BucketedOrder:
    return mbgd.BucketedOrder(values)


def nothing(dataset: Any) -> None:
    return None


MISTAKES: list[tuple[Any, str]] = [
    (weights(_3=-1.0), "the weights of data.order: 1 of 23 negative or not finite; the first is -1.0 for example 3"),
    (weights(_4=np.nan, _7=np.inf), "2 of 23 negative or not finite; the first is nan for example 4. A weight must be"),
    (mbgd.WeightedOrder(np.zeros(NUM_EXAMPLES)), "are all 0, for all 23 training examples"),
    (mbgd.WeightedOrder([1.0, 2.0]), "got shape (2,) for 23 training examples; there must be one number for each"),
    (mbgd.WeightedOrder(np.ones((NUM_EXAMPLES, 1))), "got shape (23, 1) for 23"),
    (mbgd.WeightedOrder(1.0), "got shape () for 23"),  # type: ignore[arg-type]
    (mbgd.WeightedOrder([[1.0], [1.0, 2.0]]), "got a list without a real number per example"),  # type: ignore[list-item]
    (mbgd.WeightedOrder(["a"] * NUM_EXAMPLES), "a list without a real number per example. Give"),  # type: ignore[list-item]
    (
        mbgd.WeightedOrder(nothing),
        "got a NoneType without a real number per example. Give a list or an array, the name",
    ),
    (mbgd.WeightedOrder("rarity"), "the weights of data.order=rarity: Lengthy has no attribute of this name. Give"),
    (mbgd.WeightedOrder(mbgd.balanced_classes), "Lengthy has no attribute targets. Let it have one"),
    (lengths("lenghts"), "the lengths of data.order=lenghts: Lengthy has no attribute of this name"),
    (lengths([1] * 22), "the lengths of data.order: got shape (22,) for 23 training examples"),
    (lengths([1] * 22 + [-2]), "1 of 23 negative; the first is -2 for example 22. A length must be ≥ 0"),
    (lengths([1.5] * NUM_EXAMPLES), "got type float64; a length must be a whole number"),
    (lengths([True] * NUM_EXAMPLES), "got type bool; a length must be a whole number"),
    (mbgd.BucketedOrder(window=0), "window=0 of data.order; it must be a whole number of minibatches ≥ 1"),
    (mbgd.BucketedOrder(window=2.5), "window=2.5 of data.order"),  # type: ignore[arg-type]
    (mbgd.WeightedOrder, "it must be mbgd.WeightedOrder(weights), mbgd.BucketedOrder(lengths) or None"),
    (torch.utils.data.WeightedRandomSampler([1.0], 1), "Samplers of torch know one process alone"),
]


@pytest.mark.parametrize(("order", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_refused(order: Any, message: str) -> None:
    assert message in refused(mbgd.Workers(), order)


def test_mistakes_are_refused_on_every_worker_alike() -> None:
    first, second = run_workers(refused, 2, mbgd.WeightedOrder("rarity"))
    assert first == second


def test_an_order_without_shuffling_is_refused() -> None:
    with pytest.raises(mbgd.UsageError, match=r"data\.shuffle=false with data\.order=BucketedOrder"):
        make_trainer(mbgd.Workers(), order=mbgd.BucketedOrder(), shuffle=False)


def other_weights_on_each(workers: mbgd.Workers) -> str:
    """They differ beyond the first MiB."""
    num_examples = 2**17 + 10
    values = np.ones(num_examples)
    values[-1] += workers.rank
    model = nn.Linear(1, 1)
    data = mbgd.Data(
        train=mbgd.InMemory(torch.zeros(num_examples, 1), torch.zeros(num_examples, 1)),
        order=mbgd.WeightedOrder(values),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mbgd.UsageError) as caught:
        mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, mbgd.Settings(), workers)
    return str(caught.value)


def test_weights_that_differ_between_workers_are_refused() -> None:
    for message in run_workers(other_weights_on_each, 2):
        assert "data.order: WeightedOrder with weights " in message
        assert "on worker 1" in message


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (torch.tensor([0, 0, 0, 1]), [1 / 3, 1 / 3, 1 / 3, 1.0]),
        (torch.tensor([5.0, -1.0, 5.0]), [0.5, 1.0, 0.5]),
        (torch.tensor([True, False, True]), [0.5, 1.0, 0.5]),
    ],
)
def test_balanced_classes(targets: Tensor, wanted: list[float]) -> None:
    assert mbgd.balanced_classes(mbgd.InMemory(torch.zeros(len(targets)), targets)).tolist() == wanted


@pytest.mark.parametrize("targets", [torch.tensor([0.5, 1.0]), torch.zeros(2, 3), torch.tensor([0.0, torch.nan])])
def test_targets_that_are_no_classes(targets: Tensor) -> None:
    with pytest.raises(
        mbgd.UsageError, match=r"balanced_classes: (those of InMemory are not all wh|got shape \(2, 3\))"
    ):
        mbgd.balanced_classes(mbgd.InMemory(torch.zeros(2), targets))


# By configuration


BALANCED = "data.order={_target_: mbgd.WeightedOrder, weights: {_target_: mbgd.balanced_classes}}"


def test_a_configuration_draws_classes_equally_often() -> None:
    trainer = build_trainer(typed(composed(BALANCED, "steps=20")), mbgd.Workers())
    targets = digits("train").targets
    counts = torch.zeros(10)
    for step in range(2000):
        counts += targets[trainer.setup.loader.minibatch_indices(step)].bincount(minlength=10)
    # 9 degrees of freedom: exceeded about once in 10,000.
    assert chi_square(counts.long().numpy(), float(counts.sum()) / 10) < 34
    assert trainer.fit().steps == 20
    assert trainer.setup.plan.examples_seen(20) == 20 * 64


def documented(heading: str, folder: Path) -> list[list[str]]:
    """The overrides of the commands under a heading; its functions become the module `my`, at most 10 lines each."""
    section = (ROOT / "docs/data.md").read_text().split(f"### {heading}\n")[1].split("\n##")[0]
    blocks = re.findall(r"(?:^    .*\n)+", section.replace("\\\n", " "), re.MULTILINE)
    code = [block for block in blocks if "def " in block]
    assert all(len(block.strip().splitlines()) <= 10 for block in code)
    prelude = "import torch\nfrom torch import nn\nfrom test_own_order import Documented as Sentences\n"
    (folder / "my.py").write_text(prelude + "\n".join(re.sub("^    ", "", one, flags=re.MULTILINE) for one in code))
    commands = [line for block in blocks for line in block.splitlines() if "mbgd train" in line]
    return [shlex.split(command)[2:] for command in commands]


class Documented(Lengthy):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self._inputs[index].float()}


def mean_of_squares(model: nn.Module, batch: Any) -> mbgd.PerExample:
    return mbgd.PerExample(model(batch["inputs"]).squeeze(-1).square(), batch["counts"])


OWN_PARTS = [
    *("model=own", "model._target_=torch.nn.Linear", f"+model.in_features={WIDTH}", "+model.out_features=1"),
    *("objective=own", "objective._target_=test_own_order.mean_of_squares"),
]


@pytest.mark.parametrize(("heading", "more"), [("Drawn by weights", []), ("Sorted by length", OWN_PARTS)])
def test_the_documented_commands(
    heading: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = documented(heading, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my", raising=False)
    assert commands
    for overrides in commands:
        trainer = build_trainer(typed(composed(*overrides, *more, "steps=3", "batch.size=5")), mbgd.Workers())
        assert trainer.setup.data.order is not None
        assert trainer.fit().steps == 3
        if "my.often_the_nines" in str(overrides):
            of_nines = np.asarray(trainer.setup.data.order.weights)[digits("train").targets == 9]  # type: ignore[attr-defined]
            assert set(of_nines) == {3.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.order=balanced", "data.order='balanced'; it must be mbgd.WeightedOrder"),
        ("data.order={_target_: mbgd.WeightedOrder}", "mbgd.WeightedOrder needs weights"),
        ("data.order={_target_: mbgd.BucketedOrder}", "data.order=lengths: InMemory has no attribute of this name"),
        ("data.order={_target_: mbgd.WeightedOrder, weight: a}", "does not take weight"),
        ("data.order={_target_: mbgd.WeightedOrder, weights: {_target_: mbgd.balanced}}", "mbgd.balanced"),
    ],
)
def test_mistakes_in_a_configuration(override: str, message: str) -> None:
    with pytest.raises(mbgd.UsageError) as caught:
        build_trainer(typed(composed(override)), mbgd.Workers())
    assert message in str(caught.value)


KILLED = """
import os, signal
import mbgd

def weights(dataset):
    return [float(os.environ["NINE"]) if target == 9 else 1.0 for target in dataset.targets]

class Objective(mbgd.CrossEntropy):
    num_calls = 0

    def __call__(self, model, batch):
        Objective.num_calls += 1
        if Objective.num_calls == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, batch)
"""


def run(folder: Path, name: str, *, kill_at: int = -1, nine: float = 5.0) -> subprocess.CompletedProcess[str]:
    overrides = [
        "data.order={_target_: mbgd.WeightedOrder, weights: {_target_: killed.weights}}",
        "data.evaluation=null",
    ]
    overrides += ["objective=own", "objective._target_=killed.Objective", "steps=30", "checkpoint.every_steps=4"]
    overrides += ["averaging=reproducible", "checkpoint.every_seconds=null", f"run.dir={folder / name}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "KILL_AT": str(kill_at), "NINE": str(nine)}
    command = [sys.executable, "-m", "mbgd", "train", *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_killed_run_goes_on_with_the_same_bits_and_not_with_other_weights(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    assert run(tmp_path, "a").returncode == 0
    assert run(tmp_path, "b", kill_at=150).returncode != 0  # of 8 micro-batches a step and some of the trial
    assert (tmp_path / "b/checkpoints").is_dir()
    assert not (tmp_path / "b/summary.json").exists()
    other = run(tmp_path, "b", nine=6.0)
    assert other.returncode == 2, other.stdout + other.stderr
    assert "data.order: WeightedOrder with weights" in other.stderr + other.stdout
    again = run(tmp_path, "b")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resume      step" in again.stdout
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("a", "b")]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert summaries[0]["examples_seen"] == 1437 + 7 * 64  # draws of 30 steps
