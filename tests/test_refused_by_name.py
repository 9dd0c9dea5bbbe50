"""What cannot be right on every number of workers is refused by name, in the step where it happens or before."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_accounted_for import AfterStep, Case, Linear, Running, data, made, plain_torch, squared, state, trainer_of
from torch import Tensor, nn

import mbgd
from mbgd.checkpoints.task_state import exported
from mbgd.errors import ReplicasDiffer
from mbgd.task.objective import TAKEN

from processes import run_workers

ONE = mbgd.Workers()


def refusal(case: Case, workers: mbgd.Workers = ONE, averaging: str = "ddp", cut: int | None = 3) -> str:
    """What training the case is refused with."""
    try:
        trainer = trainer_of(workers, case, averaging, cut)
        trainer.fit(AfterStep(partial(case.after_step, trainer.setup.model)))
    except (mbgd.UsageError, ReplicasDiffer) as error:
        return str(error)
    return "nothing"


# What the optimizer holds


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, objective: Any = squared, **settings: Any) -> Any:
    examples = mbgd.InMemory(*data())
    settings = {"batch": mbgd.Batch(size=8), "precision": "fp64", "steps": 4} | settings
    return mbgd.Trainer(model, objective, optimizer, mbgd.Data(train=examples), mbgd.Settings(**settings))


def test_an_optimizer_of_another_model_is_refused_naming_both() -> None:
    model, other = Linear().double(), Linear().double()
    with pytest.raises(mbgd.UsageError, match=r"of shapes \(1, 4\), \(1,\).*model \(Linear, with layer.weight"):
        trainer(model, torch.optim.SGD(other.parameters(), lr=0.1))


def test_trainable_parameters_that_no_optimizer_holds_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Flatten(0)).double()
    before = model[0].weight.detach().clone()
    trainer(model, torch.optim.SGD(model[1].parameters(), lr=0.1)).fit()
    told = [line for line in capsys.readouterr().out.splitlines() if "does not hold" in line]
    assert len(told) == 1
    assert "0.weight, 0.bias" in told[0]
    assert torch.equal(model[0].weight, before)


def test_an_optimizer_is_left_as_it_was_for_steps_of_the_users_own() -> None:
    """A fused optimizer divides by `grad_scale`, which must not stay behind; its dtype is not torch's default one."""
    torch.set_default_dtype(torch.float64)
    try:
        model = Linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
        trainer(model, optimizer).fit()
    finally:
        torch.set_default_dtype(torch.float32)
    before = model.layer.weight.detach().clone()
    model.layer.weight.grad = torch.ones_like(before)
    model.layer.bias.grad = None
    optimizer.step()
    assert torch.equal(model.layer.weight, before - 0.5)


def unfreeze_on_one(workers: mbgd.Workers, averaging: str) -> str:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))
    model[0].requires_grad_(False)

    def on_worker_1(model: nn.Module, step: int) -> None:
        if step == 2 and workers.rank == 1:
            model.requires_grad_(True)

    return refusal(Case(lambda: model, after_step=on_worker_1), workers, averaging, None)


@pytest.mark.parametrize("averaging", ["shared_memory", "reproducible"])
def test_unfreezing_on_one_worker_alone_is_refused_on_all(averaging: str) -> None:
    for message in run_workers(unfreeze_on_one, 2, averaging):
        assert "requires_grad of some parameters changed on worker 1, but not on worker 0" in message


# Hooks


def with_module_hook() -> nn.Module:
    model = Linear()
    model.layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    return model


class ClampsActivations(Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
        return outputs


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_module_hook, r"the module layer \(Linear\) has a backward hook"),
        (ClampsActivations, "does not grow in proportion to the losses"),
    ],
)
def test_hooks_that_would_see_sums_are_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        trainer_of(ONE, Case(model), "ddp", None)


# Buffers


class Odd(Linear):
    """A buffer of which a forward makes something odd."""

    def __init__(self, kind: str, first_step: int = 0) -> None:
        super().__init__()
        self.kind, self.first_step = kind, first_step
        self.register_buffer("odd", None if kind == "none" else torch.zeros(4), persistent=kind != "cache")
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        self.step += self.training
        if not self.training or self.step <= self.first_step:
            return outputs
        if self.kind == "counts examples":
            self.count += len(inputs)
        elif self.kind == "counts by value":
            self.count += int((inputs[:, 0] > 0).sum())
        elif self.kind == "graph":
            self.odd = outputs.mean() * torch.ones(4).to(inputs)
        else:
            self.odd = inputs.detach().sum(1) if self.kind != "none" else torch.ones(4).to(inputs)
        return outputs


@pytest.mark.parametrize(
    ("kind", "first_step", "message"),
    [
        ("counts examples", 0, "integer buffer count depends on the number of examples"),
        (
            "counts by value",
            2,
            r"step \d: the micro-batches of one minibatch gave an integer buffer different values",
        ),
        ("graph", 0, "buffer odd a tensor that requires a gradient"),
        ("shape", 0, r"buffer odd from float64 \(4,\) to"),
        ("shape", 2, r"buffer odd from float64 \(4,\) to"),
        ("none", 0, "buffer odd from None to"),
    ],
)
def test_buffers_that_cannot_be_averaged_are_refused(kind: str, first_step: int, message: str) -> None:
    assert re.search(message, refusal(Case(partial(Odd, kind, first_step)), cut=2 if kind != "shape" else 3))


def test_counting_examples_is_right_where_nothing_is_cut() -> None:
    case = Case(partial(Odd, "counts examples"))
    one = trainer_of(ONE, case, "ddp", None)
    one.fit()
    assert one.setup.model.count == 2 * 22


def test_a_cache_of_another_shape_is_each_workers_own() -> None:
    case = Case(partial(Odd, "cache"))
    trained = trainer_of(ONE, case, "ddp", 3)
    trained.fit()
    wanted = plain_torch(case)
    for name, value in state(trained.setup.model, None).items():
        assert torch.allclose(value, wanted[name], rtol=1e-11), name


# Parameters that a forward changes


def evaluate_on_two(workers: mbgd.Workers) -> str:
    return refusal(Case(RenormedInEvaluation), workers, "auto", None)


def test_an_evaluation_that_changes_parameters_is_refused_on_several_workers() -> None:
    for message in run_workers(evaluate_on_two, 2):
        assert "the forward in evaluation mode changes parameters in place (layer.weight)" in message


class RenormedInEvaluation(Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.1, 0.1)
        return super().forward(inputs)


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, 4, max_norm=0.5)
        self.layer = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs[:, 0].abs().long() % 5
        return self.layer(self.rows(rows)).squeeze(-1)


class LateRenormed(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        self.step += self.training
        if self.training and self.step > 2:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.1, 0.1)
        return super().forward(inputs)


def test_a_forward_that_changes_parameters_is_refused_where_the_minibatch_is_cut() -> None:
    assert "the forward changes parameters in place (rows.weight), as Embedding(max_norm" in refusal(Case(Renormed))
    assert "the forward of step 3 changed parameters in place (layer.weight)" in refusal(Case(LateRenormed))


@pytest.mark.parametrize("model", [Renormed, LateRenormed])
def test_it_is_plain_torch_with_one_worker_and_one_micro_batch(model: Callable[[], nn.Module]) -> None:
    case = Case(model)
    trained = trainer_of(ONE, case, "ddp", None, evaluates=False)
    trained.fit()
    for name, value in plain_torch(case).items():
        assert torch.allclose(state(trained.setup.model, None)[name], value, rtol=1e-11, atol=1e-13), name


def test_lazy_layers_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(1), nn.Flatten(0))
    with pytest.raises(mbgd.UsageError, match=r"parameter 0.weight has no shape yet"):
        trainer(model, torch.optim.SGD(model.parameters(), lr=0.1))


# Modes and random state


def test_a_model_left_in_evaluation_mode_is_trained_in_training_mode(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5), nn.Flatten(0)).double().eval()
    trainer(model, torch.optim.SGD(model.parameters(), lr=0.1)).fit()
    assert model[1].training
    assert "note: the model came in evaluation mode" in capsys.readouterr().out


def test_a_trainer_leaves_the_random_state_as_it_finds_it() -> None:
    model, objective, optimizer = made(Case(Linear))
    examples = mbgd.InMemory(*data())
    torch.manual_seed(3), np.random.seed(3)
    wanted = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3), np.random.seed(3)
    settings = mbgd.Settings(batch=mbgd.Batch(size=8), precision="fp64")  # type: ignore[arg-type]
    mbgd.Trainer(model, objective, optimizer, mbgd.Data(train=examples, evaluation=examples), settings)
    assert torch.equal(torch.rand(2), wanted[0])
    assert np.array_equal(np.random.rand(2), wanted[1])


def test_weights_beside_losses_of_16_bits_are_refused() -> None:
    def halves(model: nn.Module, batch: Any) -> mbgd.PerExample:
        losses = squared(model, batch).losses
        return mbgd.PerExample(losses.bfloat16(), torch.full_like(losses, 0.3))

    model = Linear().double()
    with pytest.raises(mbgd.UsageError, match=r"losses in torch.bfloat16 and weights"):
        trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), halves)


# BatchNorm and a micro-batch of one


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Flatten(0))


@pytest.mark.parametrize(("cut", "works"), [(1, False), (2, True), (None, True)])
def test_the_smallest_micro_batch_is_tried_before_training(cut: int | None, works: bool) -> None:
    if works:
        trainer_of(ONE, Case(normed), "ddp", cut).fit()
        return
    with pytest.raises(mbgd.UsageError, match=r"smallest micro-batch of this plan, of 1 examples"):
        trainer_of(ONE, Case(normed), "ddp", cut)


def test_what_a_refusal_of_a_small_micro_batch_advises_works() -> None:
    case = Case(normed)
    model, objective, optimizer = made(case)
    examples = mbgd.Data(train=mbgd.InMemory(*data()))
    settings = mbgd.Settings(batch=mbgd.Batch(size=7), precision="fp64", averaging=mbgd.Averaging("reproducible"))  # type: ignore[arg-type]
    with pytest.raises(mbgd.UsageError, match=r"What works: batch.size=(\d+)") as caught:
        mbgd.Trainer(model, objective, optimizer, examples, settings)
    size = int(str(caught.value).split("batch.size=")[1].split()[0].rstrip("."))
    model, objective, optimizer = made(case)
    mbgd.Trainer(model, objective, optimizer, examples, replace(settings, batch=mbgd.Batch(size=size))).fit()


# Evaluation


def test_an_evaluation_may_come_first_and_changes_nothing() -> None:
    results = [run_workers(evaluate_first, 2, averaging) for averaging in ("auto", "reproducible")]
    for (before, after), (others, _) in results:
        assert before == others
        assert all(torch.equal(after[0][name], value) for name, value in after[1].items())


def evaluate_first(workers: mbgd.Workers, averaging: str) -> Any:
    case = Case(partial(Running, "in place"))
    trained = trainer_of(workers, case, averaging, None)
    before = state(trained.setup.model, None)
    metrics = trained.evaluate()
    kept = state(trained.setup.model, None)
    trained.fit()
    return metrics, (kept, before)


class CountsEvaluations(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("evaluated", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        self.evaluated += not self.training
        return super().forward(inputs)


def test_buffers_that_an_evaluation_moves_are_put_back() -> None:
    trained = trainer_of(ONE, Case(CountsEvaluations), "ddp", None)
    trained.fit()
    assert trained.setup.model.evaluated == 0


def test_metrics_may_differ_between_training_and_evaluation() -> None:
    def objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
        terms = squared(model, batch)
        name = "trained" if model.training else "evaluated"
        return mbgd.PerExample(terms.losses, metrics={name: terms.losses.detach()})

    metrics = trainer_of(ONE, Case(Linear, lambda: objective), "ddp", None).fit().metrics
    assert "train/trained" in metrics
    assert metrics["eval/evaluated"] == metrics["eval/loss"]
    assert "eval/trained" not in metrics


def test_a_metric_may_not_have_a_name_of_the_trainers_own() -> None:
    def named(name: str, in_evaluation: bool) -> Callable[[nn.Module, Any], mbgd.PerExample]:
        def objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
            terms = squared(model, batch)
            ours = name if model.training is not in_evaluation else "own"
            return mbgd.PerExample(terms.losses, metrics={ours: terms.losses.detach()})

        return objective

    for name in ("loss", "learning_rate", "gradient_norm", "epoch"):
        for in_evaluation in (False, True):
            said = refusal(Case(Linear, lambda: named(name, in_evaluation)))  # noqa: B023
            assert f"a metric named '{name}', which is the name of a metric of the trainer's own" in said


def test_all_names_that_the_trainer_logs_are_taken() -> None:
    lines: list[dict[str, Any]] = []

    class Lines:
        def log(self, step: int, metrics: Any) -> None:
            lines.append(dict(metrics))

        def progress(self, step: int) -> None: ...

    case = Case(Linear, settings={"noise_scale": mbgd.NoiseScale(every_steps=1), "log_every_steps": 1})
    trainer_of(ONE, case, "reproducible", 3).fit(Lines())
    halves = mbgd.Settings(batch=mbgd.Batch(8), steps=2, precision="fp16")  # type: ignore[arg-type]
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    examples = mbgd.Data(train=mbgd.InMemory(*data()))
    mbgd.Trainer(model, squared, optimizer, examples, halves).fit(Lines())
    names = {name.partition("/")[2] for line in lines for name in line if not name.startswith("time/")}
    assert {"noise_scale", "skipped_steps", "weights_sha256", "examples_sha256"} <= names
    assert names == set(TAKEN)


def by_broadcasting(model: nn.Module, batch: Any) -> mbgd.PerExample:
    inputs, targets = batch
    return mbgd.PerExample((model(inputs) - targets.flatten()) ** 2)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_losses_of_pairs_of_examples_are_refused(size: int) -> None:
    model = Wide(1).double()
    with pytest.raises(mbgd.UsageError, match="one for each pair of examples"):
        trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), by_broadcasting, batch=mbgd.Batch(size=size)).fit()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_as_many_losses_as_examples_are_taken_where_that_is_by_chance(width: int) -> None:
    model = Wide(width).double()

    def objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
        return mbgd.PerExample((model(batch[0]) - batch[1][:, None]) ** 2)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer(model, optimizer, objective, batch=mbgd.Batch(size=max(width, 2))).fit()


class Wide(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(4, width)


@pytest.mark.parametrize("late", [False, True])
def test_weights_that_are_not_finite_are_refused(late: bool) -> None:
    calls = []

    def objective(model: nn.Module, batch: Any) -> mbgd.PerExample:
        calls.append(1)
        losses = squared(model, batch).losses
        weights = torch.ones_like(losses)
        weights[1] = torch.nan if len(calls) > 12 * late else 1.0
        return mbgd.PerExample(losses, weights)

    model = Linear().double()
    said = r"not finite at step \d+; it is not for the examples" if late else r"weights whose sum .* is nan"
    with pytest.raises(mbgd.UsageError, match=said):
        trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), objective, steps=20).fit()
    assert all(p.isfinite().all() for p in model.parameters())


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        return iter(torch.ones(4))


def test_a_dataset_without_items_by_number_is_refused_even_if_it_has_a_length() -> None:
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mbgd.UsageError, match=r"\(Stream\) has no length, or no items by number"):
        mbgd.Trainer(model, squared, optimizer, mbgd.Data(train=Stream()), mbgd.Settings(steps=1))


def test_mistakes_in_the_last_evaluation_examples_are_found_before_training() -> None:
    inputs, _ = data()
    targets = torch.zeros(22, dtype=torch.long)
    wrong = [int(v) for v in targets]
    wrong[-1] = 7

    class Listed(torch.utils.data.Dataset[Any]):
        """Without `targets` in memory, so that only reading tells."""

        def __len__(self) -> int:
            return 22

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return inputs[index], wrong[index]

    model = nn.Linear(4, 3)
    examples = mbgd.Data(train=mbgd.InMemory(inputs, targets), evaluation=Listed())
    with pytest.raises(mbgd.UsageError, match="the last examples of the evaluation set, tried before training"):
        mbgd.Trainer(model, mbgd.CrossEntropy(), torch.optim.SGD(model.parameters(), lr=0.1), examples, mbgd.Settings())


# Names


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("mask", torch.ones(3), persistent=False)
    return model


def test_exports_load_strictly() -> None:
    model = tied()
    tensors = exported(model)
    tied().load_state_dict(tensors, strict=True)
    assert sorted(tensors) == ["0.weight", "1.weight"]
    assert sorted(exported(torch.compile(tied()))) == sorted(tensors)  # type: ignore[arg-type]
    assert sorted(exported(nn.Sequential(torch.compile(nn.Linear(2, 2))))) == ["0.bias", "0.weight"]  # type: ignore[arg-type]


def test_a_compiled_model_and_a_plain_one_go_on_from_each_other() -> None:
    plain, compiled = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double(), None
    compiled = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    wrapped = torch.compile(compiled, backend="eager", dynamic=False)
    first = trainer(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    first.fit()
    second = trainer(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.1), steps=8)  # type: ignore[arg-type]
    second.restore(first.snapshot())
    assert torch.equal(compiled[0].weight, plain[0].weight)
    second.fit()
    third = trainer(plain, torch.optim.AdamW(plain.parameters(), lr=0.1), steps=8)
    third.restore(second.snapshot())
    assert torch.equal(compiled[0].weight, plain[0].weight)
    assert first.weights_sha256() == second.weights_sha256()


# Not finite


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).squeeze(-1)


def masked_root(bad_step: int, model: nn.Module, batch: Any) -> mbgd.PerExample:
    """A finite masked loss whose gradient is not finite: weight 0 on the root of 0."""
    inputs, targets = batch
    outputs = model(inputs)
    is_bad = targets == bad_step
    values = torch.where(is_bad, outputs * 0.0, outputs.abs() + 1.0)
    return mbgd.PerExample(values.sqrt(), torch.where(is_bad, 0.0, 1.0).to(values))


def not_finite_at(bad_step: int, steps: int, workers: mbgd.Workers = ONE, **settings: Any) -> str:
    torch.manual_seed(0)
    inputs = torch.randn(8 * steps, 4)
    targets = torch.arange(steps).repeat_interleave(8).float() + 1
    targets = torch.where(torch.arange(8 * steps) % 8 == 3, targets, 0.0)  # one example of each minibatch
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    examples = mbgd.Data(train=mbgd.InMemory(inputs, targets), shuffle=False)
    settings = {"batch": mbgd.Batch(size=8), "steps": steps, "noise_scale": mbgd.NoiseScale(None)} | settings
    trained = mbgd.Trainer(
        model, partial(masked_root, bad_step), optimizer, examples, mbgd.Settings(**settings), workers
    )
    with pytest.raises(mbgd.UsageError) as caught:
        trained.fit()
    return str(caught.value)


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
def test_a_gradient_that_is_not_finite_is_named_with_its_step(averaging: str) -> None:
    for message in run_workers(not_finite_of_workers, 2, averaging):
        assert "The gradient of step 3 was not finite, although its loss was" in message
        assert "layer.weight" in message
        assert "0 times an infinite derivative is nan" in message


def not_finite_of_workers(workers: mbgd.Workers, averaging: str) -> str:
    return not_finite_at(3, 7, workers, averaging=mbgd.Averaging(averaging))  # type: ignore[arg-type]


def test_it_is_noticed_at_once_where_the_norm_is_known_and_in_the_very_last_step() -> None:
    for clipped in ("max_grad_norm", "max_grad_value"):
        message = not_finite_at(3, 7, **{clipped: 1.0})
        assert "the gradient of layer.weight is not finite at step 3, although the loss is" in message
        assert "The step was not made" in message
    assert "step 7" in not_finite_at(7, 7)  # its norm is logged


def test_a_loss_that_is_not_finite_names_its_examples() -> None:
    inputs, targets = data()
    inputs[13, 2] = torch.inf
    for averaging in ("ddp", "shared_memory"):
        for message in run_workers(loss_not_finite, 2, averaging, inputs, targets):
            assert "the loss is not finite at step 2" in message
            assert "it is not for the examples 13" in message or averaging == "ddp"


def test_nor_does_a_buffer_that_moves_hide_it_until_a_logged_step() -> None:
    inputs, targets = data()
    targets[13] = torch.inf
    for message in run_workers(normed_loss_not_finite, 2, inputs, targets):
        assert "the loss is not finite at step 2; it is not for the examples 13" in message


def normed_loss_not_finite(workers: mbgd.Workers, inputs: Tensor, targets: Tensor) -> str:
    return loss_not_finite(workers, "shared_memory", inputs, targets, normed)


def loss_not_finite(
    workers: mbgd.Workers, averaging: str, inputs: Tensor, targets: Tensor, make: Callable[[], nn.Module] = Linear
) -> str:
    model = make().double()
    settings = mbgd.Settings(
        batch=mbgd.Batch(size=8),
        precision="fp64",  # type: ignore[arg-type]
        averaging=mbgd.Averaging(averaging),  # type: ignore[arg-type]
        noise_scale=mbgd.NoiseScale(None),
        log_every_steps=3,
    )
    examples = mbgd.Data(train=mbgd.InMemory(inputs, targets), shuffle=False)
    with pytest.raises(mbgd.UsageError) as caught:
        mbgd.Trainer(model, squared, torch.optim.SGD(model.parameters(), lr=0.1), examples, settings, workers).fit()
    return str(caught.value)


def test_a_state_that_is_not_finite_is_not_saved() -> None:
    trained = trainer_of(ONE, Case(Linear), "ddp", None)
    trained.fit()
    trained.setup.model.layer.weight.data[0, 1] = torch.nan
    with pytest.raises(mbgd.UsageError, match=r"is not finite, so it is not saved: layer.weight"):
        trained.snapshot()


def test_skipped_steps_in_fp16_are_no_failure() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def large(model: nn.Module, batch: Any) -> mbgd.PerExample:
        return mbgd.PerExample(F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none") * 1e4)

    examples = mbgd.InMemory(torch.randn(32, 4) * 100, torch.randint(3, (32,)))
    settings = mbgd.Settings(steps=20, batch=mbgd.Batch(size=8), precision="fp16")  # type: ignore[arg-type]
    result = mbgd.Trainer(model, large, optimizer, mbgd.Data(train=examples), settings).fit()
    assert 0 < result.num_skipped_steps < 20
    assert model.weight.isfinite().all()


# Replicas


def corrupt(workers: mbgd.Workers, what: str, averaging: str) -> str:
    def flip(model: nn.Module, step: int) -> None:
        if step != 3 or workers.rank != 1:
            return
        held = {
            "parameter": model.layer.weight,
            "buffer": model.mean,
            "optimizer": trained.setup.optimizer.state[model.layer.weight].get("momentum_buffer"),
        }[what]
        held.data.view(-1)[1] += 1e-9

    case = Case(partial(Running, "in place"), settings={"sharding": "none"})  # with it there is one copy of most
    trained = trainer_of(workers, case, averaging, None)
    with pytest.raises(ReplicasDiffer) as caught:
        trained.fit(AfterStep(partial(flip, trained.setup.model)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "name"), [("parameter", "layer.weight"), ("buffer", "mean"), ("optimizer", "0.momentum")]
)
def test_a_corrupted_replica_is_named_with_its_tensor_and_step(what: str, name: str) -> None:
    for averaging in ("ddp", "shared_memory"):
        for message in run_workers(corrupt, 2, what, averaging):
            assert "differ after step 3; they were last found alike after step 2" in message
            assert name in message
            assert "on worker 1" in message
