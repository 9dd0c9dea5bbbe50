"""The contract of state: what training changes is what plain torch makes of it, on any number of workers, or refused.

Each case builds a model, trains it in plain torch on whole minibatches, and on workers in every averaging.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import mbgd

from processes import run_workers

NUM_EXAMPLES, SIZE, EPOCHS = 22, 8, 2  # minibatches of 8, 8 and 6: shards are uneven on 3 workers
LR = 0.2
AVERAGINGS = ("ddp", "shared_memory", "reproducible")


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64)
    return inputs + torch.arange(NUM_EXAMPLES)[:, None] / 10, inputs @ torch.tensor([0.1, -0.2, 0.3, 0.4]).double()


def squared(model: nn.Module, batch: Any) -> mbgd.PerExample:
    inputs, targets = batch
    return mbgd.PerExample((model(inputs) - targets) ** 2)


@dataclass
class Case:
    model: Callable[[], nn.Module]
    objective: Callable[[], Any] = lambda: squared
    after_step: Callable[[nn.Module, int], None] = lambda model, step: None
    """What users do between steps."""
    settings: dict[str, Any] = field(default_factory=dict)


def made(case: Case) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model, objective = case.model().double(), case.objective()
    parameters = [*model.parameters(), *module_of(objective).double().parameters()]
    return model, objective, torch.optim.SGD(parameters, lr=LR, momentum=0.5)


def module_of(objective: Any) -> nn.Module:
    owner = getattr(objective, "__self__", objective)
    return owner if isinstance(owner, nn.Module) else nn.Module()


def state(model: nn.Module, objective: Any) -> dict[str, Tensor]:
    of_objective = module_of(objective).state_dict()
    return {k: v.detach().clone() for k, v in {**model.state_dict(), **of_objective}.items() if isinstance(v, Tensor)}


def plain_torch(case: Case) -> dict[str, Tensor]:
    """Whole minibatches in one process."""
    model, objective, optimizer = made(case)
    inputs, targets = data()
    step = 0
    for _ in range(EPOCHS):
        for start in range(0, NUM_EXAMPLES, SIZE):
            rows = slice(start, start + SIZE)
            optimizer.zero_grad()
            terms = objective(model, (inputs[rows], targets[rows]))
            terms.losses.mean().backward()
            optimizer.step()
            step += 1
            case.after_step(model, step)
    return state(model, objective)


class AfterStep:
    """A tracker that does to the model what the case does between steps."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.progress = call

    def log(self, step: int, metrics: Any) -> None:
        pass

    def close(self, ending: Any) -> None:
        pass


def trainer_of(
    workers: mbgd.Workers, case: Case, averaging: str, micro_batch_size: int | None, *, evaluates: bool = True
) -> Any:
    model, objective, optimizer = made(case)
    inputs, targets = data()
    settings = mbgd.Settings(
        epochs=EPOCHS,
        batch=mbgd.Batch(size=SIZE, micro_batch_size=micro_batch_size),
        precision="fp64",  # type: ignore[arg-type]
        averaging=mbgd.Averaging(name=averaging),  # type: ignore[arg-type]
        check=mbgd.Check(replicas_every_steps=1),
        **case.settings,
    )
    examples = mbgd.InMemory(inputs, targets)
    all_data = mbgd.Data(train=examples, evaluation=examples if evaluates else None, shuffle=False)
    return mbgd.Trainer(model, objective, optimizer, all_data, settings, workers)


def train(workers: mbgd.Workers, case: Case, averaging: str, micro_batch_size: int | None) -> Any:
    trainer = trainer_of(workers, case, averaging, micro_batch_size)
    trainer.fit(AfterStep(partial(case.after_step, trainer.setup.model)))
    return state(trainer.setup.model, trainer.setup.task.given_objective)


# Models, each with one thing that training changes


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).squeeze(-1)


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.zeros(()))

    def forward(self, model: nn.Module, batch: Any) -> mbgd.PerExample:
        inputs, targets = batch
        return mbgd.PerExample((model(inputs) * self.log_t.exp() - targets) ** 2)


class Complex(nn.Module):
    """A spectral layer with complex weights, and a complex table that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(3, dtype=torch.complex128))
        self.register_buffer("table", torch.polar(torch.ones(3), torch.arange(3.0)).to(torch.complex128))
        self.out = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(inputs) * self.weight * self.table
        return self.out(torch.fft.irfft(spectrum, n=4)).squeeze(-1)


class Running(Linear):
    """Normalises by a running mean of the inputs of earlier steps."""

    def __init__(self, how: str, first_step: int = 0) -> None:
        super().__init__()
        self.how, self.first_step = how, first_step
        dtype = torch.complex128 if how == "complex" else torch.float64
        self.register_buffer("mean", torch.zeros(4, dtype=dtype), persistent=how != "not saved")
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs - self.mean.real)
        if self.training:
            self.calls += 1
            if self.calls > self.first_step:
                mean = inputs.detach().mean(0) * (1 + 1j if self.how == "complex" else 1)
                if self.how in ("in place", "complex"):
                    self.mean.mul_(0.9).add_(0.1 * mean)
                else:
                    self.mean = 0.9 * self.mean + 0.1 * mean
        return outputs


class Counter(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int32))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(inputs) * (1 + self.calls / 10)  # annealed by the number of the step


class Unfreezing(nn.Module):
    """Trains its first layer from a step on, of its own accord, and no longer the last from another on."""

    def __init__(self, unfreeze_at: int = 99, freeze_at: int = 99) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 1)
        self.first.requires_grad_(False)
        self.unfreeze_at, self.freeze_at = unfreeze_at, freeze_at
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls > self.unfreeze_at:
                self.first.requires_grad_(True)
            if self.calls > self.freeze_at:
                self.last.requires_grad_(False)
        return self.last(self.first(inputs).tanh()).squeeze(-1)


def switch(model: nn.Module, step: int, *, unfreeze_at: int, freeze_at: int = 99) -> None:
    if step == unfreeze_at:
        model.first.requires_grad_(True)  # type: ignore[union-attr]
    if step == freeze_at:
        model.last.requires_grad_(False)  # type: ignore[union-attr]


class Hooked(Linear):
    """Gradients are clamped by hooks on the parameters; one hook goes after some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
        self.handle = self.layer.bias.register_hook(lambda gradient: gradient.sign() * 0.01)
        self.layer.bias.register_post_accumulate_grad_hook(self.halve)

    @staticmethod
    def halve(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)


def unhook(model: nn.Module, step: int) -> None:
    if step == 3:
        model.handle.remove()  # type: ignore[union-attr, operator]


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs).squeeze(-1)


class ActNorm(Linear):
    """Scale and shift that the first forward in training mode computes from its examples (Kingma & Dhariwal 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
        self.register_buffer("is_initialised", torch.zeros((), dtype=torch.bool))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and not self.is_initialised:
            with torch.no_grad():
                self.shift.copy_(inputs.mean(0))
                self.scale.copy_(inputs.std(0))
                self.is_initialised.fill_(True)
        return super().forward((inputs - self.shift) / self.scale)


class Frozen(nn.Module):
    """BatchNorm that its user put into evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.layers[1].running_mean.fill_(0.3)
        self.layers[1].eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs).squeeze(-1)


CASES = {
    "plain": Case(Linear),
    "objective with a parameter": Case(Linear, Temperature),
    "method of a module": Case(Linear, lambda: Temperature().forward),
    "complex": Case(Complex),
    "in place": Case(partial(Running, "in place")),
    "assigned": Case(partial(Running, "assigned")),
    "not saved": Case(partial(Running, "not saved")),
    "complex buffer": Case(partial(Running, "complex")),
    "late": Case(partial(Running, "in place", 3)),
    "late and assigned": Case(partial(Running, "assigned", 3)),
    "integer counter": Case(Counter),
    "unfrozen between steps": Case(Unfreezing, after_step=partial(switch, unfreeze_at=2)),
    "unfrozen and frozen between steps": Case(Unfreezing, after_step=partial(switch, unfreeze_at=2, freeze_at=4)),
    "unfrozen in a forward": Case(partial(Unfreezing, unfreeze_at=2)),
    "unfrozen in a forward, clipped": Case(partial(Unfreezing, unfreeze_at=3), settings={"max_grad_norm": 1e9}),
    "hooks": Case(Hooked, after_step=unhook),
    "spectral norm": Case(Spectral),
    "initialised by the first forward": Case(ActNorm),
    "frozen BatchNorm": Case(Frozen),
}


def train_all(workers: mbgd.Workers, averaging: str, micro_batch_size: int | None) -> dict[str, dict[str, Tensor]]:
    return {name: train(workers, case, averaging, micro_batch_size) for name, case in CASES.items()}


WANTED = {name: plain_torch(case) for name, case in CASES.items()}


@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize(("num_workers", "micro_batch_size"), [(1, None), (1, 3), (2, None), (3, None), (3, 2)])
def test_what_training_changes_equals_plain_torch(
    averaging: str, num_workers: int, micro_batch_size: int | None
) -> None:
    for got in run_workers(train_all, num_workers, averaging, micro_batch_size):
        for name, wanted in WANTED.items():
            for key, value in wanted.items():
                message = f"{name}: {key}: {got[name][key]}, right {value}"
                assert torch.allclose(got[name][key], value, rtol=1e-11, atol=1e-13), message


def test_the_cases_train_what_they_are_about() -> None:
    def moves(name: str, key: str) -> bool:
        return not torch.equal(WANTED[name][key], state(*made(CASES[name])[:2])[key])

    assert moves("objective with a parameter", "log_t")
    assert moves("complex", "weight")
    assert not moves("complex", "table")
    assert moves("late", "mean")
    assert moves("unfrozen in a forward", "first.weight")
    assert moves("spectral norm", "layers.0.parametrizations.weight.0._u")
    assert not moves("frozen BatchNorm", "layers.1.running_mean")
    assert WANTED["integer counter"]["calls"] == 6


def reproducible_bits(workers: mbgd.Workers) -> dict[str, dict[str, Tensor]]:
    return train_all(workers, "reproducible", None)


def test_the_same_bits_on_any_number_of_workers() -> None:
    (one,) = run_workers(reproducible_bits, 1)
    for num_workers in (2, 3):
        for got in run_workers(reproducible_bits, num_workers):
            for name, wanted in one.items():
                assert all(torch.equal(got[name][key], value) for key, value in wanted.items()), name
