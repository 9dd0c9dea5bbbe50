"""sharding=optimizer: the owner of a piece of the parameters updates it, with the same bits as without."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mbgd
from mbgd import averaging as averagings
from mbgd.averaging.host_memory import memory as host_memory
from mbgd.averaging.host_memory.memory import CannotShareError, HostMemory
from mbgd.averaging.pieces import BLOCK, Owned, Piece, cut_by_parameters, cut_in_blocks
from mbgd.checkpoints.snapshot import Snapshot
from mbgd.data import InMemory
from mbgd.optimizers import Lamb, Lars, MuonAdamW
from mbgd.step.norms import NormOfPieces, TotalNorm

from processes import run_workers

NUM_STEPS = 5

# The cut


@given(st.lists(st.integers(0, 5 * BLOCK), min_size=1, max_size=6), st.integers(1, 9), st.booleans())
def test_every_element_is_owned_once(sizes: list[int], num_workers: int, by_blocks: bool) -> None:
    parameters = [torch.empty(size, device="meta") for size in sizes]
    cut = cut_in_blocks(parameters, num_workers) if by_blocks else cut_by_parameters(parameters, sizes, num_workers)
    assert len(cut) == num_workers
    pieces = sorted((piece for of_worker in cut for piece in of_worker), key=lambda one: (one.parameter, one.start))
    assert {piece.parameter for piece in pieces} == set(range(len(sizes)))  # empty ones, too: they have state
    for number, size in enumerate(sizes):
        of_parameter = [piece for piece in pieces if piece.parameter == number]
        assert of_parameter[0].start == 0
        assert of_parameter[-1].stop == size
        assert all(one.stop == other.start and one.stop % BLOCK == 0 for one, other in pairwise(of_parameter))
    if by_blocks:
        loads = [sum(piece.stop - piece.start for piece in of_worker) for of_worker in cut]
        assert max(loads) <= sum(sizes) / num_workers + BLOCK + 1
    else:
        assert all((piece.start, piece.stop) == (0, sizes[piece.parameter]) for piece in pieces)


@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=4), st.integers(1, 5), st.data())
def test_the_norm_does_not_depend_on_the_pieces(sizes: list[int], num_workers: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    used = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    parameters = [torch.randn(size, generator=generator) for size in sizes]
    for parameter, is_used in zip(parameters, used, strict=True):
        parameter.grad = torch.randn(parameter.shape, generator=generator) if is_used else None
    wanted = TotalNorm(parameters)([parameter.grad for parameter in parameters])
    cut = cut_in_blocks(parameters, num_workers)
    sent: list[Tensor] = []
    for rank in range(num_workers):  # what each sends

        def send(values: Tensor) -> list[Tensor]:
            sent.append(values)
            return [values] * num_workers

        NormOfPieces(parameters, cut, rank, send)(gradients_of_pieces(parameters, cut, rank))
    norm = NormOfPieces(parameters, cut, 0, lambda _: sent)
    assert norm(gradients_of_pieces(parameters, cut, 0)).item() == wanted.item()
    exact = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None) ** 0.5
    assert wanted.item() == pytest.approx(exact, rel=1e-5)


def gradients_of_pieces(parameters: list[Tensor], cut: list[list[Piece]], rank: int) -> list[Tensor | None]:
    owned = Owned(parameters, cut, parameters, rank)
    owned.take_gradients()
    return [tensor.grad for tensor in owned.tensors]


# The same bits


class Net(nn.Module):
    """Odd sizes, so that vectors have tails; a tied matrix, a frozen one, and one used by some examples only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(61, 449)
        self.second = nn.Linear(449, 37)
        self.again = nn.Linear(37, 449, bias=False)
        self.again.weight = nn.Parameter(self.second.weight.detach().clone().t())  # not contiguous
        self.frozen = nn.Linear(37, 37)
        self.frozen.requires_grad_(False)
        self.rare = nn.Linear(61, 3)
        self.never = nn.Linear(5, 3)
        self.head = nn.Linear(37, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(inputs))))
        hidden = self.frozen(torch.tanh(self.second(torch.tanh(self.again(hidden)))))
        outputs: Tensor = self.head(hidden)
        return outputs + self.rare(inputs) if (inputs[:, 0] > 2.4).any() else outputs


def examples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(90, 61, generator=generator)
    return inputs.to(dtype), torch.randint(3, (90,), generator=generator)


Make = Callable[[Net], torch.optim.Optimizer]


def _of_torch(name: str, options: dict[str, Any], model: Net) -> torch.optim.Optimizer:
    bias = [p for name, p in model.named_parameters() if name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": others}, {"params": bias, "lr": 0.003}]
    made: torch.optim.Optimizer = getattr(torch.optim, name)(groups, **{"lr": 0.01, **options})
    return made


def of_torch(name: str, **options: Any) -> Make:
    return partial(_of_torch, name, options)


def _own(kind: type[torch.optim.Optimizer], model: Net) -> torch.optim.Optimizer:
    return kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]


def own(kind: type[torch.optim.Optimizer]) -> Make:
    return partial(_own, kind)


def muon(model: Net) -> torch.optim.Optimizer:
    return MuonAdamW(model.named_parameters(), lr=0.01)


ADAMW = of_torch("AdamW", fused=True)


def _made(kind: Callable[..., Any], *arguments: Any) -> list[Any]:
    return [kind(*arguments)]


@dataclass(frozen=True)
class Case:
    name: str
    make: Make = ADAMW
    settings: Mapping[str, Any] = field(default_factory=dict)
    observers: Callable[[], list[Any]] = list
    hooks: bool = False


OPTIMIZERS = (
    *(Case(f"{name}", of_torch(name)) for name in ("Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")),
    Case("SGD", of_torch("SGD", momentum=0.9, nesterov=True, weight_decay=0.01)),
    Case("SGD without momentum", of_torch("SGD")),
    Case("SGD, fused", of_torch("SGD", momentum=0.9, fused=True)),
    Case("Adam", of_torch("Adam", amsgrad=True)),
    Case("Adam, foreach", of_torch("Adam", foreach=True)),
    Case("AdamW, fused", of_torch("AdamW", fused=True)),
    Case("RMSprop", of_torch("RMSprop", momentum=0.9, centered=True)),
    Case("Adagrad, whose state begins before the first step", of_torch("Adagrad", fused=True)),
    Case("Adafactor", of_torch("Adafactor")),
    Case("Lamb", own(Lamb)),
    Case("Lars", own(Lars)),
    Case("Muon and AdamW", muon),
)
OTHERS = (
    Case("fp64", settings={"precision": "fp64"}),
    Case("bf16", settings={"precision": "bf16"}),
    Case("bf16-true", settings={"precision": "bf16-true"}),
    Case("fp16", settings={"precision": "fp16"}),
    Case("clipped", settings={"max_grad_norm": 0.05}),
    Case("clipped by value and norm", settings={"max_grad_norm": 0.05, "max_grad_value": 1e-3}),
    Case("a moving average", observers=partial(_made, mbgd.EMA, 0.9)),
    Case("frozen at first", observers=partial(_made, mbgd.Freeze, ["first.*"], 2)),
    Case("hooks on gradients", hooks=True),
    Case("a schedule", settings={"schedule": mbgd.schedule.Cosine(num_steps=9)}),
)
CASES = (*OPTIMIZERS, *OTHERS)
ON_MANY = [case for case in CASES if case.name in ("AdamW, fused", "Muon and AdamW", "fp16", "clipped")]
SHARING = ("shared_memory", "reproducible")
SENDING = ("ddp", "reproducible over gloo")


def no_memory(workers: mbgd.Workers) -> None:
    raise CannotShareError("this test sends messages")


def averaging_of(name: str, **options: Any) -> mbgd.Averaging:
    """For the trainers that this process makes next; over gloo: without shared memory, as on several hosts."""
    name, over, _ = name.partition(" over ")
    averagings.HostMemory = no_memory if over else HostMemory  # type: ignore[assignment, misc]
    return mbgd.Averaging(name, **options)  # type: ignore[arg-type]


def make_trainer(
    workers: mbgd.Workers, case: Case, transport: str, sharding: str, steps: int, **more: Any
) -> mbgd.Trainer:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    optimizer = case.make(model)
    if case.hooks:
        model.first.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        model.second.weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.mul_(2))  # type: ignore[no-untyped-call, union-attr]
    every: dict[str, Any] = {
        "log_every_steps": 2,
        "evaluation": mbgd.Evaluation(every_steps=2),
        "noise_scale": mbgd.NoiseScale(every_steps=2),
    }
    settings = mbgd.Settings(
        steps=steps,
        batch=mbgd.Batch(16),
        averaging=averaging_of(transport, find_unused_parameters=True),
        sharding=sharding,  # type: ignore[arg-type]
        **{**every, **case.settings, **more},
    )
    data = mbgd.Data(train=InMemory(*examples()), evaluation=InMemory(*examples()))
    return mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers, case.observers())


class Logged:
    """What a tracker got, without times."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.lines.append((step, {k: v for k, v in metrics.items() if not k.startswith("time/")}))

    def close(self) -> None:
        pass


def digest(snapshot: Snapshot) -> str:
    whole = hashlib.sha256()
    for file, tensors in sorted(snapshot.tensors.items()):
        for name, tensor in sorted(tensors.items()):
            whole.update(f"{file} {name} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}".encode())
            whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    values = {name: value for name, value in snapshot.values.items() if name != "metrics"}
    return whole.hexdigest() + repr(sorted(values.items(), key=str))


def train(workers: mbgd.Workers, case: Case, transport: str, sharding: str) -> tuple[str, Any, str]:
    """What the state and the log are at the end, and the plan's words."""
    trainer = make_trainer(workers, case, transport, sharding, NUM_STEPS)
    logged = Logged()
    trainer.fit(logged)
    return digest(trainer.snapshot()), logged.lines, trainer.train_step.describe_sharding


def train_all(workers: mbgd.Workers, cases: list[Case], transport: str, sharding: str) -> list[Any]:
    return [train(workers, case, transport, sharding) for case in cases]


@cache
def all_trained(num_workers: int, transport: str, sharding: str) -> list[dict[str, Any]]:
    """Of each worker, by the case's name."""
    cases = list(CASES) if num_workers <= 3 else ON_MANY
    results = run_workers(train_all, num_workers, cases, transport, sharding, timeout_seconds=600)
    return [{case.name: one for case, one in zip(cases, of_worker, strict=True)} for of_worker in results]


SETUPS = [
    *((case, n, transport) for transport in (*SHARING, *SENDING) for n in (2, 3) for case in CASES),
    *((case, n, transport) for transport in SHARING for n in (4, 5, 8) for case in ON_MANY),
    *((case, n, transport) for n, transport in zip((4, 5), SENDING, strict=True) for case in ON_MANY),
]


@pytest.mark.parametrize(("case", "num_workers", "transport"), SETUPS, ids=lambda one: getattr(one, "name", one))
def test_sharding_changes_no_bit(case: Case, num_workers: int, transport: str) -> None:
    """The state with every stride, and every logged number, against the same workers without sharding."""
    if transport.startswith("reproducible"):  # whose bits do not depend on the number of workers
        wanted = all_trained(1, "reproducible", "none")[0][case.name]
    else:
        wanted = all_trained(num_workers, transport, "none")[0][case.name]
    for got in all_trained(num_workers, transport, "optimizer"):
        state, logged, plan = got[case.name]
        assert plan.startswith("optimizer: each worker updates at most ")
        assert logged == wanted[1]
        assert state == wanted[0]


class Tiny(nn.Module):
    """One parameter, so that all workers but one have nothing to update."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(61, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs


def train_tiny(workers: mbgd.Workers, sharding: str) -> list[str]:
    results = []
    for name, settings in (
        ("AdamW", {}),
        ("SGD", {"max_grad_norm": 0.01}),
        ("SGD", {"max_grad_value": 1e-3, "max_grad_norm": 0.01}),
        ("AdamW", {"precision": "fp16"}),
        ("Adafactor", {}),
    ):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        every: Any = {"log_every_steps": 1, "averaging": mbgd.Averaging("reproducible"), "sharding": sharding}  # type: ignore[arg-type]
        settings = mbgd.Settings(steps=NUM_STEPS, batch=mbgd.Batch(16), **every, **settings)  # type: ignore[arg-type]
        data = mbgd.Data(train=InMemory(*examples()), evaluation=InMemory(*examples()))
        observers = [mbgd.Histograms(3)]
        trainer = mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers, observers)
        trainer.fit()
        results.append(digest(trainer.snapshot()))
    return results


def test_workers_may_have_nothing_to_update() -> None:
    (wanted,) = run_workers(train_tiny, 1, "none")
    assert run_workers(train_tiny, 3, "optimizer") == [wanted] * 3


# Checkpoints


def go_on(
    workers: mbgd.Workers, before: Snapshot | None, to: int, sharding: str, case: Case, transport: str = "reproducible"
) -> Snapshot:
    trainer = make_trainer(workers, case, transport, sharding, to)
    if before is not None:
        trainer.restore(before)
    trainer.fit()
    return trainer.snapshot()


@pytest.mark.parametrize("case", [CASES[5], OPTIMIZERS[11], OPTIMIZERS[-1]], ids=lambda case: case.name)
def test_checkpoints_fit_any_number_of_workers_with_and_without_sharding(case: Case) -> None:
    (wanted,) = run_workers(go_on, 1, None, 10, "none", case)
    snapshot = None
    ways = [(4, 2, "optimizer"), (2, 4, "optimizer"), (3, 6, "none"), (3, 8, "optimizer"), (1, 10, "auto")]
    for number, (num_workers, to, sharding) in enumerate(ways):
        transport = ("reproducible over gloo", "reproducible")[number % 2]
        snapshots = run_workers(go_on, num_workers, snapshot, to, sharding, case, transport)
        assert len({digest(one) for one in snapshots}) == 1
        snapshot = snapshots[0]
    assert snapshot is not None
    assert digest(snapshot) == digest(wanted)


def fit_twice(workers: mbgd.Workers, case: Case, transport: str) -> tuple[list[int], list[str], str]:
    trainer = make_trainer(workers, case, transport, "optimizer", NUM_STEPS)
    optimizer, parameters = trainer.setup.optimizer, trainer.setup.trained.parameters
    trainer.fit()
    held = [len(group["params"]) for group in optimizer.param_groups]
    shapes = [str(tuple(optimizer.state[p]["exp_avg"].shape)) for p in parameters if p in optimizer.state]
    assert len(optimizer.state_dict()["state"]) == len(optimizer.state)
    optimizer.load_state_dict(optimizer.state_dict())  # as a user may, between two calls
    trainer.state.step = 0
    trainer.fit()
    return held, shapes, trainer.weights_sha256()


@pytest.mark.parametrize("transport", ["shared_memory", "ddp"])
def test_after_training_the_optimizer_is_as_it_was_given(transport: str) -> None:
    case = OPTIMIZERS[11]
    model = Net()
    wanted = [len(group["params"]) for group in case.make(model).param_groups]
    results = run_workers(fit_twice, 2, case, transport)
    for held, shapes, _ in results:
        assert held == wanted
        assert str((449, 61)) in shapes
    assert len({weights for *_, weights in results}) == 1


class AsksForState(Logged):
    """What a user's tracker may save after each step, on any worker."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._optimizer = optimizer
        self.states: list[str] = []

    def progress(self, step: int) -> None:
        state = self._optimizer.state_dict()
        self.states.append(repr((state["param_groups"], sorted(state["state"].items()))))


def ask_for_state(workers: mbgd.Workers, sharding: str, case: Case) -> list[str]:
    trainer = make_trainer(workers, case, "reproducible", sharding, NUM_STEPS)
    asks = AsksForState(trainer.setup.optimizer)
    trainer.fit(asks)
    return asks.states


@pytest.mark.parametrize("name", ["AdamW, fused", "Lamb"])
def test_state_dict_is_whole_during_training(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    (wanted,) = run_workers(ask_for_state, 1, "none", case)
    assert len(set(wanted)) == NUM_STEPS
    assert run_workers(ask_for_state, 3, "optimizer", case) == [wanted] * 3


# Changes by others


class Clamps(Net):
    """Writes to parameters without raising their versions, which is the same on every worker."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.head.weight.data.mul_(0.9)
        return super().forward(inputs)


class Replaces(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        self.head.weight.data = self.head.weight.data.clone()
        return super().forward(inputs)


def train_changed(workers: mbgd.Workers, kind: type[Net], sharding: str) -> str:
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = mbgd.Settings(steps=4, batch=mbgd.Batch(16), sharding=sharding)  # type: ignore[arg-type]
    try:
        trainer = mbgd.Trainer(
            model, mbgd.CrossEntropy(), optimizer, mbgd.Data(train=InMemory(*examples())), settings, workers
        )
        trainer.fit()
    except mbgd.UsageError as error:
        return str(error)
    return trainer.weights_sha256()


@pytest.mark.parametrize("kind", [Clamps, Replaces])
def test_parameters_that_others_write_are_named(kind: type[Net]) -> None:
    for message in run_workers(train_changed, 2, kind, "optimizer"):
        assert "by step 1 something other than the optimizer has written to parameters" in message
        assert "head.weight" in message
        assert "sharding=none" in message
    assert len(set(run_workers(train_changed, 2, kind, "none"))) == 1


class Scales:
    """An observer that changes parameters: once with sharding=none, and once for each worker in shared memory."""

    def before_training(self, trainer: mbgd.Trainer) -> None:
        self.head = trainer.setup.trained.by_name["head.weight"]

    def after_update(self, done: mbgd.Done) -> None:
        with torch.no_grad():
            self.head.mul_(0.9)


def observed(workers: mbgd.Workers, sharding: str) -> tuple[str, str]:
    case = Case("an observer", observers=partial(_made, Scales))
    trainer = make_trainer(workers, case, "reproducible", sharding, NUM_STEPS)
    try:
        trainer.fit()
    except mbgd.UsageError as error:
        return trainer.train_step.describe_sharding, str(error)
    return trainer.train_step.describe_sharding, trainer.weights_sha256()


def test_users_observers_may_change_parameters() -> None:
    (wanted,) = run_workers(observed, 1, "none")
    for plan, weights in run_workers(observed, 2, "auto"):
        assert plan == "none: the observer Scales may change parameters, or look at gradients"
        assert weights == wanted[1]
    for _, message in run_workers(observed, 2, "optimizer"):
        assert "by step 1 something other than the optimizer has written to parameters" in message


# What does not shard


class PerElement(torch.optim.SGD):
    """A user's own, which works in any pieces."""


class PerParameter(torch.optim.Optimizer):
    """Scales each parameter's gradient to norm 1."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad / parameter.grad.norm()


class OverAll(PerParameter):
    """Scales all gradients together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        for parameter in held:
            parameter -= 0.1 * parameter.grad / norm


def plan_of(workers: mbgd.Workers, make: Make, averaging: str, sharding: str) -> str:
    try:
        trainer = make_trainer(workers, Case("", make), averaging, sharding, NUM_STEPS)
    except mbgd.UsageError as error:
        return f"refused: {error}"
    trainer.fit()
    return f"{trainer.train_step.describe_sharding} {trainer.weights_sha256()}"


def with_hook(model: Net) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("make", "averaging", "reason"),
    [
        (own(OverAll), "auto", "OverAll in pieces computes something else"),
        (with_hook, "auto", "the optimizer's step has hooks or was replaced"),
        (own(OverAll), "ddp", "OverAll in pieces computes something else"),
    ],
)
def test_what_cannot_be_sharded_is_refused_where_it_is_asked_for(make: Make, averaging: str, reason: str) -> None:
    plain = {plan.split()[-1] for plan in run_workers(plan_of, 2, make, averaging, "none")}
    for plan in run_workers(plan_of, 2, make, averaging, "optimizer"):
        assert plan.startswith(f"refused: sharding=optimizer, but {reason}")
        assert "sharding=none" in plan
    for plan in run_workers(plan_of, 2, make, averaging, "auto"):
        assert plan.startswith("none: ")
        assert {plan.split()[-1]} == plain


@pytest.mark.parametrize("kind", [PerElement, PerParameter])
def test_optimizers_of_the_users_are_tried(kind: type[torch.optim.Optimizer]) -> None:
    (unsharded,) = set(run_workers(plan_of, 2, own(kind), "auto", "none"))
    assert {f"none: {kind.__name__} is not known {unsharded.split()[-1]}"} == set(
        run_workers(plan_of, 2, own(kind), "auto", "auto")
    )
    (sharded,) = set(run_workers(plan_of, 2, own(kind), "auto", "optimizer"))
    assert sharded.startswith("optimizer: ")
    assert sharded.split()[-1] == unsharded.split()[-1]


class Wide(nn.Linear):
    """Of a size from which on auto shards."""

    def __init__(self) -> None:
        super().__init__(61, 5000)


def plan_of_wide(workers: mbgd.Workers) -> str:
    model = Wide()
    settings = mbgd.Settings(steps=1, batch=mbgd.Batch(16))
    data = mbgd.Data(train=InMemory(*examples()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers).train_step.describe_sharding


def test_auto_shards_from_a_size_on() -> None:
    assert all(plan.startswith("optimizer: ") for plan in run_workers(plan_of_wide, 2))
    assert all(plan.startswith("none: for parameters of") for plan in run_workers(plan_of, 2, ADAMW, "auto", "auto"))


def with_little_memory(workers: mbgd.Workers) -> str:
    make_file, sizes = host_memory._make_file, []

    def limited(num_bytes: int) -> int:
        sizes.append(num_bytes)
        if num_bytes > 2**16 and max(sizes[:-1]) > 2**16:  # the gradients fit, the parameters do not
            raise OSError(f"{num_bytes} bytes of shared memory cannot be allocated")
        return make_file(num_bytes)

    host_memory._make_file = limited
    return plan_of(workers, of_torch("SGD"), "auto", "optimizer")


def test_too_little_memory_is_told() -> None:
    for plan in run_workers(with_little_memory, 2):
        assert plan.startswith("none: worker 0 cannot: ")


# A step that goes wrong


class Spoilt(Net):
    """Losses are finite, the gradient of `head.bias` is not, from the third step on."""

    num_forwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        if self.training:
            self.num_forwards += 1
        if self.num_forwards > 4:
            outputs = outputs + 0 * torch.sqrt(self.head.bias - self.head.bias.detach())
        return outputs


def train_spoilt(workers: mbgd.Workers) -> str:
    torch.manual_seed(0)
    model = Spoilt()
    settings = mbgd.Settings(steps=9, batch=mbgd.Batch(16), sharding="optimizer", log_every_steps=1)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    data = mbgd.Data(train=InMemory(*examples()))
    with pytest.raises(mbgd.UsageError) as caught:
        mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers).fit()
    return str(caught.value)


def test_a_gradient_that_is_not_finite_is_named_by_all() -> None:
    for message in run_workers(train_spoilt, 3):
        assert "the gradient of head.bias is not finite at step" in message
