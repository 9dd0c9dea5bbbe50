"""sharding=optimizer with odd parameters, optimizers of users, and changes between steps and trainings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_sharding import Logged, averaging_of, digest, examples
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mbgd
from mbgd.averaging.pieces import BLOCK
from mbgd.data import InMemory
from mbgd.errors import ObserverFailed

from processes import run_workers

NUM_STEPS = 4
TRANSPORTS = ("shared_memory", "ddp")


class Net(nn.Module):
    """Of several blocks; with parameters of no element, of one, and of one more than a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(61, 700)
        self.head = nn.Linear(700, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.edge = nn.Parameter(torch.randn(BLOCK + 1))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(self.first(inputs))) * self.scale
        return outputs + self.empty.sum() + self.edge.mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def trainer_of(
    workers: mbgd.Workers,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    transport: str,
    sharding: str,
    **more: Any,
) -> mbgd.Trainer:
    torch.set_num_threads(1)
    settings = mbgd.Settings(
        steps=NUM_STEPS,
        batch=mbgd.Batch(16),
        averaging=averaging_of(transport, find_unused_parameters=True),
        sharding=sharding,  # type: ignore[arg-type]
        log_every_steps=1,
    )
    data = mbgd.Data(train=InMemory(*examples()), evaluation=InMemory(*examples()))
    return mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers, **more)


def fit(trainer: mbgd.Trainer) -> str:
    """What the state and the log are at the end."""
    logged = Logged()
    trainer.fit(logged)
    return digest(trainer.snapshot()) + repr(logged.lines)


def train(
    workers: mbgd.Workers, kind: type[nn.Module], make: Callable[[Any], torch.optim.Optimizer], transport: str, how: str
) -> str:
    torch.manual_seed(0)
    model = kind()
    try:
        return fit(trainer_of(workers, model, make(model), transport, how))
    except mbgd.UsageError as error:
        return f"refused: {error}"


def all_alike(function: Callable[..., str], *arguments: Any) -> str:
    (told,) = set(run_workers(function, 2, *arguments))
    return told


# Parameters


class TiedByData(Net):
    """Two parameters in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(61, 700)
        self.again.weight.data = self.first.weight.data

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)
        return outputs + self.again(inputs).mean(1, keepdim=True).tanh()


class KeepsView(Net):
    """A view of a parameter, as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.row = self.head.weight.data[0]

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)
        return outputs * self.row.norm()


class OfOneTensor(nn.Module):
    """Parameters that are parts of one tensor, next to each other."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(64 * 700) * 0.1
        self.first = nn.Parameter(flat[: 61 * 700].view(700, 61))
        self.second = nn.Parameter(flat[61 * 700 :].view(3, 700))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.first.T) @ self.second.T


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("kind", "name"), [(TiedByData, "again.weight"), (KeepsView, "row")])
def test_parameters_that_share_memory_are_refused(kind: type[nn.Module], name: str, transport: str) -> None:
    told = all_alike(train, kind, adamw, transport, "optimizer")
    assert told.startswith("refused: sharding=optimizer, but ")
    assert name in told
    assert "lie in the same memory" in told


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", [Net, OfOneTensor])
def test_odd_parameters_get_the_same_bits(kind: type[nn.Module], transport: str) -> None:
    assert all_alike(train, kind, adamw, transport, "optimizer") == all_alike(train, kind, adamw, transport, "none")


# Optimizers of users


class Own(torch.optim.Optimizer):
    """SGD, one parameter after the other. It makes an entry of state for each, as many optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group, self.state[parameter])

    def update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * parameter.grad)


class CountsInShape1(Own):
    def update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state["step"], state["mean"] = torch.zeros(1), [torch.zeros_like(parameter), "text"]
        state["step"] += 1
        state["mean"][0].lerp_(parameter.grad, 0.1)
        parameter.sub_(group["lr"] * state["mean"][0] / float(state["step"]))


class NormInState(Own):
    """Which counts from the third step on."""

    def update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state["step"] = state.get("step", 0) + 1
        state["norm"] = float(parameter.grad.norm()) + state.get("norm", 0.0)
        parameter.sub_(group["lr"] * parameter.grad / (1 + (state["norm"] if state["step"] > 2 else 0)))


class OnceNotZero(Own):
    """Makes state once a gradient has an element that is not 0."""

    def update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        if parameter.grad.any():
            state.setdefault("mean", torch.zeros_like(parameter)).add_(parameter.grad)
            parameter.sub_(group["lr"] * state["mean"])


class SumInGroup(Own):
    """Which counts once more than two steps were made."""

    def update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        group["count"], group["sum"] = group.get("count", 0) + 1, group.get("sum", 0.0) + float(parameter.grad.sum())
        parameter.sub_(group["lr"] * parameter.grad * (1 + (group["sum"] if group["count"] > 12 else 0)))


class SumInAttribute(Own):
    count, sum = 0, 0.0

    def update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        assert parameter.grad is not None
        self.count, self.sum = self.count + 1, self.sum + float(parameter.grad.sum())
        parameter.sub_(group["lr"] * parameter.grad * (1 + (self.sum if self.count > 12 else 0)))


class HoldsParameters(Own):
    """In a list of its own, where nobody replaces them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.mine = [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.mine:
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)


class StateForAll(Own):
    """From the third step on."""

    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.count += 1
        if self.count > 2:
            self.state["all"] = {"count": self.count}  # type: ignore[index]


class Embedded(nn.Module):
    """Most rows are used by no example."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(800, 70)
        self.head = nn.Linear(70, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.table((inputs.abs() * 100).long().clamp(max=799)).mean(1))
        return outputs


def own(kind: type[Own]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return partial(_own, kind)


def _own(kind: type[Own], model: nn.Module) -> torch.optim.Optimizer:
    return kind(model.parameters())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("kind", "model"), [(Own, Net), (CountsInShape1, Net), (NormInState, Net), (OnceNotZero, Embedded)]
)
def test_users_optimizers_keep_the_same_state(kind: type[Own], model: type[nn.Module], transport: str) -> None:
    """Those that look at whole parameters get these."""
    wanted = all_alike(train, model, own(kind), transport, "none")
    assert all_alike(train, model, own(kind), transport, "optimizer") == wanted


@pytest.mark.parametrize("kind", [SumInGroup, SumInAttribute, HoldsParameters])
def test_optimizers_that_look_at_all_parameters_are_refused(kind: type[Own]) -> None:
    told = all_alike(train, Net, own(kind), "shared_memory", "optimizer")
    assert told.startswith(f"refused: sharding=optimizer, but {kind.__name__} in pieces computes something else")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_state_that_belongs_to_no_parameter_is_refused(transport: str) -> None:
    told = all_alike(train, Net, own(StateForAll), transport, "optimizer")
    assert told.startswith(
        "refused: the optimizer StateForAll has made state for 'all', which is none of its parameters"
    )


# Hooks


def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(1 + parameter.grad.norm())


class Hooks:
    """An observer that registers a hook after the second step."""

    def before_training(self, trainer: mbgd.Trainer) -> None:
        self.optimizer = trainer.setup.optimizer

    def after_update(self, done: mbgd.Done) -> None:
        if done.step == 1:
            self.optimizer.register_step_pre_hook(halve)  # type: ignore[arg-type]


def train_hooked(workers: mbgd.Workers, transport: str) -> str:
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model)
    handle = register_optimizer_step_pre_hook(halve)  # type: ignore[arg-type]
    with pytest.raises(mbgd.UsageError, match="the optimizer's step has hooks"):
        trainer_of(workers, model, optimizer, transport, "optimizer")
    handle.remove()
    trainer = trainer_of(workers, model, optimizer, transport, "optimizer", observers=[Hooks()])
    with pytest.raises(mbgd.UsageError) as caught:
        trainer.fit()
    return str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_hooks_on_the_step_are_refused_whenever_they_come(transport: str) -> None:
    told = all_alike(train_hooked, transport)
    assert told.startswith("before step 2: since the trainer was made, a hook was registered on the optimizer's step")


# Between steps and trainings


def state_of_another(model: nn.Module) -> dict[str, Any]:
    """After a step of another optimizer like that of the model."""
    torch.manual_seed(1)
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    other = torch.optim.AdamW(copies, lr=0.01)
    for parameter in copies:
        parameter.grad = torch.randn_like(parameter)
    other.step()
    return other.state_dict()


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 61, generator=generator)).square().mean().backward()
        optimizer.step()


def train_and_change(workers: mbgd.Workers, transport: str, sharding: str) -> str:
    """A user loads state, trains by hand, scales state, and makes one trainer after another."""
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model)
    trainer_of(workers, model, optimizer, transport, sharding)
    trainer = trainer_of(workers, model, optimizer, transport, sharding)
    optimizer.load_state_dict(state_of_another(model))
    told = [fit(trainer)]
    by_hand(model, optimizer)
    for state in optimizer.state.values():
        state["exp_avg"].mul_(0.5)
    told.append(digest(trainer.snapshot()))
    trainer.state.step = 0
    told.append(fit(trainer))
    by_hand(model, optimizer)
    told.append(fit(trainer_of(workers, model, optimizer, transport, sharding)))
    return " ".join(told)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_between_trainings_the_optimizer_is_the_users(transport: str) -> None:
    wanted = all_alike(train_and_change, transport, "none")
    assert all_alike(train_and_change, transport, "optimizer") == wanted


class Loads(Hooks):
    """An observer that loads the optimizer's state during training."""

    def after_update(self, done: mbgd.Done) -> None:
        self.optimizer.load_state_dict({})


def train_badly(workers: mbgd.Workers, transport: str) -> str:
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model)
    trainer = trainer_of(workers, model, optimizer, transport, "optimizer", observers=[Loads()])
    with pytest.raises((ObserverFailed, mbgd.UsageError)) as loading:
        trainer.fit()
    with pytest.raises(mbgd.UsageError) as again:
        trainer_of(workers, model, optimizer, transport, "optimizer")
    return f"{loading.value} / {again.value}"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_optimizer_that_holds_pieces_is_not_used_otherwise(transport: str) -> None:
    told = all_alike(train_badly, transport)
    assert "optimizer.load_state_dict during training" in told
    assert "holds pieces of the parameters for another Trainer" in told


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.convolution(inputs[:, :60].view(-1, 3, 4, 5)).mean((2, 3)))
        return outputs


def train_reordered(workers: mbgd.Workers, transport: str) -> str:
    model = Image()
    trainer = trainer_of(workers, model, adamw(model), transport, "optimizer")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with pytest.raises(mbgd.UsageError) as caught:
        trainer.fit()
    return str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_another_memory_format_is_refused_after_the_trainer_was_made(transport: str) -> None:
    assert "the order in memory has changed of the parameters convolution.weight" in all_alike(
        train_reordered, transport
    )


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 16, 3, padding=1)
        self.second = nn.Conv3d(16, 64, 3)
        self.head = nn.Linear(64, 3)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(inputs[:, :60].reshape(-1, 1, 3, 4, 5))))
        outputs: Tensor = self.head(hidden.mean((2, 3, 4)))
        return outputs


def train_with_loaded_order(workers: mbgd.Workers, sharding: str) -> str:
    """State in another order of dimensions than the parameters."""
    torch.manual_seed(0)
    model = Volume()
    optimizer = adamw(model)
    trainer = trainer_of(workers, model, optimizer, "shared_memory", sharding)
    trainer.fit()
    loaded = optimizer.state_dict()
    for state in loaded["state"].values():
        state.update({name: one.clone(memory_format=torch.contiguous_format) for name, one in state.items()})
    optimizer.load_state_dict(loaded)
    trainer.state.step = 0
    trainer.fit()
    return trainer.weights_sha256()


def test_state_may_be_loaded_in_another_order() -> None:
    assert all_alike(train_with_loaded_order, "optimizer") == all_alike(train_with_loaded_order, "none")
