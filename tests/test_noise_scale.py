"""The gradient noise scale, against every example's own gradient."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import Order
from mbgd.data import digits
from mbgd.step.noise_scale import estimate, noise_sums

from processes import run_workers

NUM_EXAMPLES = 120
AS_GOOD_AS_A_MEAN = mbgd.NoiseScale(every_steps=1, smoothing=10_000)
EVERY_STEP = mbgd.NoiseScale(every_steps=1, smoothing=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have it: bits depend on it, and so does how long many small steps take on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@cache
def examples() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and weights, some of which are 0; the classes can be told apart, more or less."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(3, (NUM_EXAMPLES,), generator=generator)
    inputs = torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64) + F.one_hot(targets, 4)
    weights = torch.rand(NUM_EXAMPLES, generator=generator, dtype=torch.float64)
    return inputs, targets, weights * (weights > 0.2)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Rows:
    """The examples as a dataset in memory."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[index] for part in examples())

    def gather(self, indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[indices] for part in examples())


class Weighted:
    """Cross-entropy, with or without the examples' weights."""

    def __init__(self, has_weights: bool) -> None:
        self.has_weights = has_weights

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        inputs, targets, weights = batch
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        return mbgd.PerExample(losses, weights if self.has_weights else None)


@cache
def gradients() -> Tensor:
    """Every example's own gradient: (NUM_EXAMPLES, number of parameters)."""
    model, rows = make_model(), []
    inputs, targets, _ = examples()
    for one, target in zip(inputs, targets, strict=True):
        loss = F.cross_entropy(model(one[None]), target[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


class Lines:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Any) -> None:
        if "train/loss" not in metrics:
            return
        kept = ("train/noise_scale", "train/gradient_variance", "train/gradient_norm")
        self.lines.append({name: value for name, value in metrics.items() if name in kept})

    def close(self, *ending: object) -> None:
        pass


def train(
    workers: mbgd.Workers,
    batch: mbgd.Batch,
    *,
    averaging: str = "ddp",
    has_weights: bool = False,
    lr: float = 0.0,
    **settings: Any,
) -> list[dict[str, float]]:
    """What is logged of every step; with a learning rate of 0 all are of the same parameters."""
    model, lines = make_model(), Lines()
    values = {"steps": 1, "log_every_steps": 1, "noise_scale": EVERY_STEP, "precision": mbgd.Precision.fp64} | settings
    mbgd.Trainer(
        model,
        Weighted(has_weights),
        torch.optim.SGD(model.parameters(), lr=lr),
        mbgd.Data(train=Rows()),
        mbgd.Settings(batch=batch, averaging=mbgd.Averaging(mbgd.AveragingName(averaging)), **values),
        workers,
    ).fit(lines)
    return lines.lines


def minibatch(step: int, size: int) -> list[int]:
    per_epoch = -(-NUM_EXAMPLES // size)
    epoch, start = step // per_epoch, step % per_epoch * size
    return Order(NUM_EXAMPLES, 0).indices(epoch, start, min(start + size, NUM_EXAMPLES)).tolist()


# One minibatch

CASES = [(averaging, has_weights) for averaging in ("ddp", "reproducible") for has_weights in (False, True)]


def train_cases(workers: mbgd.Workers) -> list[Any]:
    """Steps of 50, 50 and 20 examples, in micro-batches of 1 (unweighted) and of at most 7 and other sizes."""
    ones = [train(workers, mbgd.Batch(50, 1), averaging=name, steps=3) for name in ("ddp", "reproducible")]
    uneven = [train(workers, mbgd.Batch(50, 7), averaging=name, has_weights=w, steps=3) for name, w in CASES]
    return [ones, uneven]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda n: f"{n} workers")
def trained(request: pytest.FixtureRequest) -> list[Any]:
    return run_workers(train_cases, request.param)


def test_with_micro_batches_of_one_example_it_is_the_variance_of_the_examples(trained: list[Any]) -> None:
    for ones, _ in trained:
        for lines in ones:
            for step, line in enumerate(lines):
                rows = gradients()[minibatch(step, 50)]
                trace = float(rows.var(0, unbiased=True).sum())
                squared_gradient = float(rows.mean(0).square().sum()) - trace / len(rows)
                # What is logged is of a minibatch of 50, also where the last one of an epoch is shorter.
                assert line["train/gradient_variance"] == pytest.approx(trace / 50, rel=1e-10)
                if squared_gradient > 0:
                    assert line["train/noise_scale"] == pytest.approx(trace / squared_gradient, rel=1e-9)
                else:
                    assert "train/noise_scale" not in line


def test_uneven_micro_batches_with_weights(trained: list[Any]) -> None:
    for _, uneven in trained:
        for (_, has_weights), lines in zip(CASES, uneven, strict=True):
            for step, line in enumerate(lines):
                indices = minibatch(step, 50)
                weights = examples()[2] if has_weights else torch.ones(NUM_EXAMPLES, dtype=torch.float64)
                num_parts = -(-len(indices) // 7)
                edges = [part * len(indices) // num_parts for part in range(num_parts + 1)]
                parts = [indices[a:b] for a, b in pairwise(edges)]
                b = torch.stack([weights[part].sum() for part in parts])
                sums = torch.stack([(weights[part, None] * gradients()[part]).sum(0) for part in parts])
                g_of = sums / b[:, None]
                g = (b[:, None] * g_of).sum(0) / b.sum()
                q = float((b / b.sum() * g_of.square().sum(1)).sum())
                variance = (q - float(g.square().sum())) / (num_parts - 1)
                assert line["train/gradient_norm"] == pytest.approx(float(g.norm()), rel=1e-11)
                assert line["train/gradient_variance"] == pytest.approx(variance * len(indices) / 50, rel=1e-9)


def test_reproducible_averaging_gives_the_same_bits_on_any_number_of_workers(trained: list[Any]) -> None:
    wanted = train_cases(mbgd.Workers())
    for ones, uneven in trained:
        assert ones[1] == wanted[0][1]
        assert uneven[2:] == wanted[1][2:]


# Many minibatches


def gaussian_estimates(rng: np.random.Generator, sizes: tuple[int, ...]) -> tuple[float, float, float]:
    """(tr Σ, |G|², the tr Σ that forgets the sizes) estimated from one minibatch of normal gradients."""
    shards = [rng.normal(0.3, 1.0, (size, 4)) for size in sizes]
    sums = torch.tensor(np.array([shard.sum(0) for shard in shards]))
    n = sum(sizes)
    g = sums.sum(0) / n
    weights = torch.tensor(sizes, dtype=torch.float64)
    total = torch.stack([noise_sums(s.square().sum(), b) for s, b in zip(sums, weights, strict=True)]).sum(0)
    variance, squared_gradient = estimate(total, n, g.norm())
    means = sums / weights[:, None]
    naive = (means.square().sum(1).mean() - g.square().sum()) * n / (len(sizes) - 1)
    return n * float(variance), float(squared_gradient), float(naive)


@pytest.mark.parametrize("sizes", [(10, 10), (3, 5, 60), (1, 1, 1, 17)])
def test_estimates_from_uneven_shards_are_unbiased(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    estimates = np.array([gaussian_estimates(rng, sizes) for _ in range(3000)])
    mean, error = estimates.mean(0), estimates.std(0) / math.sqrt(len(estimates))
    assert abs(mean[0] - 4.0) < 4 * error[0]
    assert abs(mean[1] - 4 * 0.3**2) < 4 * error[1]
    if len(set(sizes)) > 1:  # teeth: the formula for equal shards is far off
        assert mean[2] > 1.3 * 4.0


@cache
def of_all_examples() -> tuple[float, float]:
    """(tr Σ, |G|²) by brute force."""
    return float(gradients().var(0, unbiased=True).sum()), float(gradients().mean(0).square().sum())


def train_smoothed(workers: mbgd.Workers) -> list[dict[str, float]]:
    """For both averagings, 300 measurements of as many micro-batches as the averaging makes of itself."""
    settings = {"steps": 300, "noise_scale": AS_GOOD_AS_A_MEAN, "log_every_steps": 300}
    return [train(workers, mbgd.Batch(12), averaging=name, **settings)[-1] for name in ("ddp", "reproducible")]


def test_smoothed_it_comes_to_that_of_all_examples() -> None:
    trace, squared_gradient = of_all_examples()
    for line in run_workers(train_smoothed, 3)[0]:
        assert line["train/gradient_variance"] == pytest.approx(trace / 12, rel=0.1)
        # Of examples drawn without replacement, the estimate of |G|² is that much lower.
        wanted = trace / (squared_gradient - trace / NUM_EXAMPLES)
        assert line["train/noise_scale"] == pytest.approx(wanted, rel=0.2)


def test_the_variance_of_the_mean_gradient_falls_as_the_minibatch_grows() -> None:
    trace, _ = of_all_examples()
    for size in (6, 24, 60):
        steps = 60 * 24 // size
        settings = {"steps": steps, "noise_scale": AS_GOOD_AS_A_MEAN, "log_every_steps": steps}
        measured = train(mbgd.Workers(), mbgd.Batch(size, 3), **settings)[-1]["train/gradient_variance"]
        means = torch.stack([gradients()[minibatch(step, size)].mean(0) for step in range(steps)])
        seen = float((means - gradients().mean(0)).square().sum(1).mean())
        assert measured == pytest.approx(seen / (1 - size / NUM_EXAMPLES), rel=0.15)  # drawn without replacement
        assert measured * size == pytest.approx(trace, rel=0.1)


# In training


def train_resumed(workers: mbgd.Workers, averaging: str, stop_after: int | None) -> list[dict[str, float]]:
    def trainer(steps: int) -> tuple[mbgd.Trainer, Lines]:
        model = make_model()
        settings = mbgd.Settings(
            steps=steps,
            batch=mbgd.Batch(30, 7),
            averaging=mbgd.Averaging(mbgd.AveragingName(averaging)),
            log_every_steps=1,
            noise_scale=mbgd.NoiseScale(every_steps=3, smoothing=4),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        data = mbgd.Data(train=Rows())
        return mbgd.Trainer(model, Weighted(True), optimizer, data, settings, workers), Lines()

    one, lines = trainer(12 if stop_after is None else stop_after)
    one.fit(lines)
    if stop_after is None:
        return lines.lines
    other, more = trainer(12)
    other.restore(one.snapshot())
    other.fit(more)
    return lines.lines + more.lines


def test_a_resumed_run_goes_on_with_the_same_bits() -> None:
    wanted = train_resumed(mbgd.Workers(), "reproducible", None)
    assert "train/gradient_variance" not in wanted[1]
    assert wanted[2]["train/gradient_variance"] == wanted[4]["train/gradient_variance"] > 0
    assert wanted[5]["train/gradient_variance"] != wanted[4]["train/gradient_variance"]
    for stop_after in (2, 7):
        assert train_resumed(mbgd.Workers(), "reproducible", stop_after) == wanted
    assert run_workers(train_resumed, 2, "reproducible", 7) == [wanted, wanted]


def train_measured_or_not(workers: mbgd.Workers) -> list[list[bytes]]:
    """The parameters after training with and without measuring, for each averaging."""
    results = []
    for averaging in ("ddp", "reproducible"):
        of_averaging = []
        for every_steps in (1, None):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
            settings = mbgd.Settings(
                steps=8,
                batch=mbgd.Batch(50, 7),
                averaging=mbgd.Averaging(mbgd.AveragingName(averaging)),
                noise_scale=mbgd.NoiseScale(every_steps),
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            mbgd.Trainer(
                model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=digits("test")), settings, workers
            ).fit()
            of_averaging.append(nn.utils.parameters_to_vector(model.parameters()).detach().numpy().tobytes())
        results.append(of_averaging)
    return results


def test_measuring_does_not_change_training() -> None:
    for results in (train_measured_or_not(mbgd.Workers()), *run_workers(train_measured_or_not, 2)):
        for measured, unmeasured in results:
            assert measured == unmeasured


@pytest.mark.parametrize("precision", [mbgd.Precision.fp32, mbgd.Precision.fp16])
def test_loss_scaling_does_not_show(precision: mbgd.Precision) -> None:
    [wanted] = train(mbgd.Workers(), mbgd.Batch(50, 7))
    [line] = train(mbgd.Workers(), mbgd.Batch(50, 7), precision=precision)
    assert line["train/gradient_variance"] == pytest.approx(wanted["train/gradient_variance"], rel=5e-3)


def test_one_micro_batch_has_none_to_be_compared_with() -> None:
    model = make_model()
    trainer = mbgd.Trainer(
        model,
        Weighted(False),
        torch.optim.SGD(model.parameters()),
        mbgd.Data(train=Rows()),
        mbgd.Settings(batch=mbgd.Batch(30)),
    )
    assert (
        trainer.train_step.noise_scale.describe() == "not measured: needs 2 micro-batches (batch.micro_batch_size=15)"
    )
    assert train(mbgd.Workers(), mbgd.Batch(30), steps=2) == [
        {"train/gradient_norm": pytest.approx(norm)}
        for norm in (float(gradients()[minibatch(step, 30)].mean(0).norm()) for step in range(2))
    ]


def halve_or_cut(gradient: Tensor) -> Tensor:
    return (gradient * 0.5).clamp(-0.01, 0.01)


def train_hooked(workers: mbgd.Workers, averaging: str, sharding: str) -> list[dict[str, float]]:
    model, lines = make_model(), Lines()
    for parameter in model.parameters():
        parameter.register_hook(halve_or_cut)
    mbgd.Trainer(
        model,
        Weighted(False),
        torch.optim.SGD(model.parameters(), lr=0.0),
        mbgd.Data(train=Rows()),
        mbgd.Settings(
            steps=1,
            batch=mbgd.Batch(50, 1),
            averaging=mbgd.Averaging(averaging),  # type: ignore[arg-type]
            sharding=sharding,  # type: ignore[arg-type]
            noise_scale=EVERY_STEP,
            precision=mbgd.Precision.fp64,
        ),
        workers,
    ).fit(lines)
    return lines.lines


HOOKED = [(1, "auto", "none"), (2, "ddp", "optimizer"), (3, "reproducible", "none")]


@pytest.mark.parametrize(("num_workers", "averaging", "sharding"), HOOKED)
def test_hooks_that_change_the_gradient_do_not_change_its_noise(
    num_workers: int, averaging: str, sharding: str
) -> None:
    """It is that of the gradients; the norm in the log is that of what the hooks make of their mean."""
    mine = gradients()[minibatch(0, 50)]
    variance = float(mine.var(0).sum()) / 50
    squared = float(mine.mean(0).square().sum()) - variance
    for (line,) in run_workers(train_hooked, num_workers, averaging, sharding):
        assert line["train/gradient_variance"] == pytest.approx(variance, rel=1e-10)
        assert line["train/noise_scale"] == pytest.approx(50 * variance / squared, rel=1e-10)
        assert line["train/gradient_norm"] == pytest.approx(float(halve_or_cut(mine.mean(0)).norm()), rel=1e-10)


def train_unfrozen(workers: mbgd.Workers, averaging: str) -> list[dict[str, float]]:
    """What is logged of two steps; the last layer is frozen in the first."""
    model, lines = make_model(), Lines()
    settings = mbgd.Settings(
        steps=2,
        batch=mbgd.Batch(50, 1),
        averaging=mbgd.Averaging(averaging),  # type: ignore[arg-type]
        log_every_steps=1,
        noise_scale=EVERY_STEP,
        precision=mbgd.Precision.fp64,
    )
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.0), mbgd.Data(train=Rows())
    observers = [mbgd.Freeze(["2.*"], until=1)]
    mbgd.Trainer(model, Weighted(False), optimizer, data, settings, workers, observers).fit(lines)
    return lines.lines


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
def test_parameters_that_were_just_unfrozen_count(averaging: str) -> None:
    num_of_last_layer = 5 * 3 + 3
    for lines in run_workers(train_unfrozen, 2, averaging):
        for step, line in enumerate(lines):
            mine = gradients()[minibatch(step, 50)]
            mine = mine[:, :-num_of_last_layer] if step == 0 else mine
            assert line["train/gradient_variance"] == pytest.approx(float(mine.var(0).sum()) / 50, rel=1e-10)
