"""Training as a whole, on real workers: precisions, buffers, odd parameters, datasets, evaluation, errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import mbgd
from mbgd.batches.plan import Plan
from mbgd.data import digits

from processes import run_workers


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def fit(
    workers: mbgd.Workers,
    model: nn.Module,
    *,
    data: mbgd.Data | None = None,
    precision: str = "fp64",
    lr: float = 0.1,
    adamw: bool = False,
    **settings: Any,
) -> tuple[Tensor, mbgd.Result]:
    """Train on the digits (or `data`); the parameters at the end, and the result."""
    data = data or mbgd.Data(train=digits("train"), evaluation=digits("test"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.1) if adamw else torch.optim.SGD(trainable, lr=lr)
    batch = mbgd.Batch(size=settings.pop("size", 100), micro_batch_size=settings.pop("micro_batch_size", None))
    settings = {"steps": 20, "log_every_steps": 1} | settings
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        optimizer,
        data,
        mbgd.Settings(batch=batch, precision=mbgd.Precision(precision), **settings),
        workers,
    )
    result = trainer.fit()
    return flat(model), result


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


# Precisions


def train_precision(workers: mbgd.Workers, precision: str) -> tuple[Tensor, mbgd.Result]:
    return fit(workers, mlp(), precision=precision, steps=60, lr=0.5)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_precisions_train_alike_on_one_and_three_workers(precision: str, tolerance: float) -> None:
    wanted, _ = run_workers(train_precision, 1, "fp64")[0]
    for num_workers in (1, 3):
        results = run_workers(train_precision, num_workers, precision)
        got, result = results[0]
        assert float((got - wanted).norm() / wanted.norm()) < tolerance
        assert result.metrics["eval/accuracy"] > 0.8
        assert all(torch.equal(got, other) for other, _ in results[1:])


def train_overflowing(workers: mbgd.Workers) -> tuple[Tensor, Tensor, int]:
    model = mlp()
    before = flat(model)
    with torch.no_grad():
        model[1].weight *= 3000.0
    start = flat(model)
    after, result = fit(workers, model, precision="fp16", steps=1, lr=1.0)
    assert not torch.equal(before, start)
    return start, after, result.num_skipped_steps


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_overflow_in_fp16_skips_the_step_on_every_worker_and_is_counted(num_workers: int) -> None:
    for start, after, skipped in run_workers(train_overflowing, num_workers):
        assert skipped == 1
        assert torch.equal(start, after)


# Parameters that take part sometimes, never, or twice


class Branching(nn.Module):
    """`rare` takes part only where an example has a bright pixel; `never` in no step; `frozen` is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Linear(64, 10)
        self.rare = nn.Linear(64, 10)
        self.never = nn.Linear(64, 10)
        self.frozen = nn.Linear(10, 10)
        self.frozen.requires_grad_(False)
        self.tied = nn.Linear(10, 10, bias=False)
        self.tied_again = nn.Linear(10, 10, bias=False)
        self.tied_again.weight = self.tied.weight

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        logits = self.common(inputs)
        bright = inputs[:, 2] > 0.9
        if bright.any():
            logits = torch.where(bright[:, None], logits + self.rare(inputs), logits)
        return logits + self.tied_again(torch.tanh(self.tied(self.frozen(logits))))


def train_branching(workers: mbgd.Workers, micro_batch_size: int | None, name: str) -> dict[str, Tensor]:
    averaging = mbgd.Averaging(mbgd.AveragingName(name))
    torch.manual_seed(0)
    model = Branching().double()
    fit(workers, model, size=6, micro_batch_size=micro_batch_size, averaging=averaging, steps=30, adamw=True, lr=0.01)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory"])
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_unused_frozen_and_tied_parameters(micro_batch_size: int | None, averaging: str) -> None:
    torch.manual_seed(0)
    start = dict(Branching().double().named_parameters())
    # One worker and one micro-batch is plain autograd: unused parameters have no gradient and AdamW leaves them alone.
    wanted = train_branching(mbgd.Workers(), None, averaging)
    assert torch.equal(wanted["never.weight"], start["never.weight"])
    assert torch.equal(wanted["frozen.weight"], start["frozen.weight"])
    assert not torch.equal(wanted["rare.weight"], start["rare.weight"])
    for num_workers in (1, 2, 3):
        for got in run_workers(train_branching, num_workers, micro_batch_size, averaging):
            for name, value in wanted.items():
                assert torch.allclose(got[name], value, rtol=1e-9, atol=1e-12), name


# Buffers


def batch_norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def train_batch_norm(workers: mbgd.Workers) -> tuple[Tensor, dict[str, Tensor]]:
    model = batch_norm_model()
    parameters, _ = fit(workers, model, size=97, micro_batch_size=13)
    return parameters, {name: b.clone() for name, b in model.named_buffers()}


def test_running_statistics_do_not_depend_on_the_number_of_workers() -> None:
    wanted, wanted_buffers = run_workers(train_batch_norm, 1)[0]
    assert int(wanted_buffers["2.num_batches_tracked"]) == 20
    for num_workers in (2, 3):
        for parameters, buffers in run_workers(train_batch_norm, num_workers):
            assert torch.allclose(parameters, wanted, rtol=1e-10, atol=1e-12)
            for name, value in wanted_buffers.items():
                assert torch.allclose(buffers[name].double(), value.double(), rtol=1e-10), name


# Dropout


def train_dropout(workers: mbgd.Workers) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))
    torch.rand(workers.rank + 3)  # what ran before must not matter
    return fit(workers, model, micro_batch_size=20)[0]


def test_dropout_is_keyed_by_the_micro_batch() -> None:
    wanted = run_workers(train_dropout, 1)[0]
    for num_workers in (2, 3):
        assert torch.allclose(run_workers(train_dropout, num_workers)[0], wanted, rtol=1e-10, atol=1e-12)


# Datasets and evaluation


class Counted(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Digits without `gather`, each with its own number beside its target."""

    def __init__(self, split: str) -> None:
        self.rows = digits(split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return (*self.rows[index], index)


def seen_examples(workers: mbgd.Workers, num_loader_workers: int) -> tuple[list[list[int]], list[int]]:
    """The example numbers that this worker computes: in each training step, and in one evaluation."""
    model = mlp()
    seen: list[int] = []

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> mbgd.PerExample:
        inputs, targets, numbers = batch
        seen.extend(numbers.tolist())
        return mbgd.PerExample(F.cross_entropy(model(inputs), targets, reduction="none"))

    rows = Counted("all")
    trainer = mbgd.Trainer(
        model,
        objective,
        torch.optim.SGD(model.parameters(), lr=0.01),
        mbgd.Data(train=rows, evaluation=rows, num_workers=num_loader_workers),
        mbgd.Settings(epochs=1, batch=mbgd.Batch(size=100, micro_batch_size=30)),
        workers,
    )
    steps = []
    for shard in trainer.setup.loader.shards(0, trainer.setup.num_steps):
        seen.clear()
        trainer.train_step(shard)
        steps.append(list(seen))
    seen.clear()
    trainer.evaluate()
    return steps, seen


@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_every_example_once_in_the_same_order_on_any_number_of_workers(num_loader_workers: int) -> None:
    (wanted, wanted_evaluation) = run_workers(seen_examples, 1, 0)[0]
    assert sorted(sum(wanted, [])) == list(range(1797))
    assert wanted_evaluation == list(range(1797))
    for num_workers in (1, 3):
        results = run_workers(seen_examples, num_workers, num_loader_workers)
        steps = [sum(of_workers, []) for of_workers in zip(*(steps for steps, _ in results), strict=True)]
        assert steps == wanted
        assert sum((evaluation for _, evaluation in results), []) == wanted_evaluation


def evaluate_only(workers: mbgd.Workers, size: int) -> dict[str, float]:
    everything = digits("all")
    few = mbgd.InMemory(everything.inputs[:size], everything.targets[:size])
    data = mbgd.Data(train=everything, evaluation=few)
    return fit(workers, mlp(), data=data, steps=0)[1].metrics


@pytest.mark.parametrize("size", [1, 2, 257, 1797])
def test_evaluation_is_the_exact_mean(size: int) -> None:
    everything, model = digits("all"), mlp().double()
    logits = model(everything.inputs[:size].double())
    loss = F.cross_entropy(logits, everything.targets[:size]).item()
    accuracy = (logits.argmax(1) == everything.targets[:size]).double().mean().item()
    for num_workers in (1, 3):
        for metrics in run_workers(evaluate_only, num_workers, size):
            assert metrics == {"eval/loss": pytest.approx(loss, rel=1e-12), "eval/accuracy": accuracy}


# Errors


def train_diverging(workers: mbgd.Workers) -> str:
    with pytest.raises(mbgd.UsageError) as caught:
        fit(workers, mlp(), precision="fp32", lr=1e30, log_every_steps=10)
    return str(caught.value)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_loss_that_is_not_finite_stops_every_worker_and_names_the_steps(num_workers: int) -> None:
    for message in run_workers(train_diverging, num_workers):
        assert "the loss is not finite at step 2" in message


def bad_objective(kind: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return {
        "scalar": lambda: mbgd.PerExample(losses.mean()),
        "tensor": lambda: losses,
        "wrong shape": lambda: mbgd.PerExample(losses[:-1]),
        "negative": lambda: mbgd.PerExample(losses, -torch.ones_like(losses)),
        "all zero": lambda: mbgd.PerExample(losses, torch.zeros_like(losses)),
        "detached": lambda: mbgd.PerExample(losses.detach()),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("scalar", "reduction='none'"),
        ("tensor", "must return mbgd.PerExample"),
        ("wrong shape", "expected one loss per example"),
        ("negative", "negative weights"),
        ("all zero", "only zero weights"),
        ("detached", "do not depend on any"),
    ],
)
def test_a_broken_objective_is_refused_before_training(kind: str, message: str) -> None:
    model = mlp()
    with pytest.raises(mbgd.UsageError, match=message):
        mbgd.Trainer(
            model,
            partial(bad_objective, kind),
            torch.optim.SGD(model.parameters(), lr=0.1),
            mbgd.Data(train=digits("train")),
            mbgd.Settings(),
        )


class Later:
    """Gives other losses from the first evaluation on; in each step their mean would be divided by another number."""

    def __init__(self, *, has_weights: bool) -> None:
        self.has_weights, self.has_begun = has_weights, False

    def after_evaluation(self, step: int, metrics: object) -> None:
        self.has_begun = True

    def __call__(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        losses = (model(batch[0]) - batch[1]).square()
        if not self.has_begun:
            return mbgd.PerExample(losses.mean(1))
        if self.has_weights:
            return mbgd.PerExample(losses.mean(1), torch.full_like(losses[:, 0], 4.0))
        return mbgd.PerExample(losses)


def refused_later(workers: mbgd.Workers, has_weights: bool) -> str:
    model, inputs = nn.Linear(3, 2), torch.ones(12, 3)
    objective, dataset = Later(has_weights=has_weights), mbgd.InMemory(inputs, inputs[:, :2])
    settings = mbgd.Settings(epochs=2, batch=mbgd.Batch(4), log_every_steps=100)
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.1), mbgd.Data(train=dataset, evaluation=dataset)
    with pytest.raises(mbgd.UsageError) as refusal:
        mbgd.Trainer(model, objective, optimizer, data, settings, workers, [objective]).fit()
    return str(refusal.value)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("has_weights", "message"),
    [
        (True, "step 4: the objective returned weights, but none"),
        (False, "step 4: the objective returned losses of sh"),
    ],
)
def test_losses_of_another_kind_than_those_tried_before_training_are_refused(
    num_workers: int, has_weights: bool, message: str
) -> None:
    for told in run_workers(refused_later, num_workers, has_weights):
        assert told.startswith(message)


def test_complex_gradients_are_not_clipped_by_value() -> None:
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(mbgd.UsageError, match=r"max_grad_value=0.1, but the parameters weight, bias are complex"):
        mbgd.Trainer(
            model,
            lambda model, batch: mbgd.PerExample(model(batch[0].to(torch.complex64)).abs().mean(1)),
            torch.optim.SGD(model.parameters(), lr=0.1),
            mbgd.Data(train=mbgd.InMemory(torch.ones(4, 3), torch.ones(4))),
            mbgd.Settings(max_grad_value=0.1, batch=mbgd.Batch(4)),
        )


def test_sparse_gradients_are_refused_before_training() -> None:
    model = nn.Sequential(nn.Embedding(17, 4, sparse=True), nn.Flatten(), nn.Linear(4 * 64, 10))
    data = mbgd.Data(train=mbgd.InMemory(torch.zeros(8, 64, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)))
    with pytest.raises(mbgd.UsageError, match=r"the gradient of parameter 0\.weight is sparse"):
        fit(mbgd.Workers(), model, data=data)


def test_targets_outside_the_classes_are_refused_before_training() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(mbgd.UsageError, match="the model has 7 outputs, so a target must be 0 to 6"):
        fit(mbgd.Workers(), model)


def test_all_broken_settings_are_named_at_once() -> None:
    with pytest.raises(mbgd.UsageError, match=r"(?s)batch.size=0.*max_grad_norm=-1"):
        fit(mbgd.Workers(), mlp(), size=0, max_grad_norm=-1.0)


def test_dropping_the_last_minibatch_must_leave_one() -> None:
    plan = Plan(num_examples=1797, minibatch_size=100, num_workers=1, drop_last=True)
    assert plan.steps_per_epoch == 17
    with pytest.raises(mbgd.UsageError, match="leaves none of the 1437"):
        mbgd.Trainer(
            mlp(),
            mbgd.CrossEntropy(),
            torch.optim.SGD(mlp().parameters(), lr=0.1),
            mbgd.Data(train=digits("train")),
            mbgd.Settings(batch=mbgd.Batch(size=2000, drop_last=True)),
        )


# Bits


def train_whole_numbers(workers: mbgd.Workers, micro_batch_size: int | None, averaging: str) -> Tensor:
    """One step whose every sum is exact in float32: whole-numbered inputs, targets and parameters."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(-8, 8, (97, 6), generator=generator).float()
    targets = torch.randint(-8, 8, (97, 3), generator=generator).float()
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-4, 4, (3, 6), generator=generator))
        model.bias.zero_()

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> mbgd.PerExample:
        return mbgd.PerExample((model(batch[0]) - batch[1]).square().sum(1))

    trainer = mbgd.Trainer(
        model,
        objective,
        torch.optim.SGD(model.parameters(), lr=1.0),
        mbgd.Data(train=mbgd.InMemory(inputs, targets)),
        mbgd.Settings(
            steps=1,
            batch=mbgd.Batch(size=97, micro_batch_size=micro_batch_size),
            averaging=mbgd.Averaging(mbgd.AveragingName(averaging)),
        ),
        workers,
    )
    trainer.fit()
    return flat(model)


def train_whole_numbers_each_way(workers: mbgd.Workers) -> list[Tensor]:
    return [
        train_whole_numbers(workers, micro_batch_size, averaging)
        for micro_batch_size in (None, 1, 7)
        for averaging in ("ddp", "shared_memory")
    ]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_problems_whose_sums_are_exact_give_equal_bits(num_workers: int) -> None:
    wanted = train_whole_numbers(mbgd.Workers(), None, "ddp")
    for of_worker in run_workers(train_whole_numbers_each_way, num_workers):
        for got in of_worker:
            assert torch.equal(got, wanted)


def _train_sgd(prepare: Callable[[torch.optim.Optimizer], object]) -> Tensor:
    """Parameters after 4 steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(optimizer)
    data = mbgd.InMemory(torch.randn(16, 3), torch.randn(16, 1))
    settings = mbgd.Settings(steps=4, batch=mbgd.Batch(8))
    mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, mbgd.Data(train=data), settings).fit()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_what_hangs_on_an_optimizers_step_is_called_once_a_step() -> None:
    """The trainer leaves out torch's record of the call for profilers, and nothing else."""
    plain = _train_sgd(lambda optimizer: None)
    calls: list[str] = []
    hooked = _train_sgd(
        lambda optimizer: (
            optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
            optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        )
    )
    assert calls == ["before", "after"] * 4
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    try:
        _train_sgd(lambda optimizer: None)
    finally:
        handle.remove()
    assert calls.count("global") >= 4  # the trial of the optimizer before training makes a step, too

    def replace(optimizer: torch.optim.Optimizer) -> None:
        step = optimizer.step
        optimizer.step = lambda *_: calls.append("replaced") or step()  # type: ignore[method-assign,func-returns-value]

    replaced = _train_sgd(replace)
    assert calls.count("replaced") == 4
    assert torch.equal(plain, hooked)
    assert torch.equal(plain, replaced)
