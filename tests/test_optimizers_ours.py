"""mbgd's own optimizers: against the papers' formulas in plain torch, on any number of workers, and across a resume."""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_configuration import CONF, composed
from test_exactness import Rows, objective, relative_error, rows, uniform
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mbgd
from mbgd.batches.order import Order
from mbgd.batches.plan import Plan
from mbgd.building.build import build_trainer, typed
from mbgd.errors import Preempted
from mbgd.optimizers import Lamb, Lars, MuonAdamW, scale_lr
from mbgd.optimizers.muon import NOT_HIDDEN
from mbgd.runs.wording import plan_lines
from mbgd.step.optimizer_state import OptimizerState

import reference
from processes import run_workers
from small_runs import StopAt

NUM_EXAMPLES, MINIBATCH, STEPS, SEED = 70, 16, 7, 11


# The formulas


def layers() -> list[nn.Parameter]:
    torch.manual_seed(3)
    made = [torch.randn(5, 4), torch.randn(4), torch.randn(3, 2, 3, 3), torch.zeros(2, 3), torch.randn(())]
    return [nn.Parameter(one.double()) for one in made]


def gradients(step: int, parameters: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    return [one * 10.0 ** (number - 2) for number, one in enumerate(drawn)]


def lamb_of_the_paper(
    x: Tensor,
    steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bounds: tuple[float, float] = (0.0, math.inf),
    adapts: bool,
) -> Tensor:
    """You et al. 2020, algorithm 2, for one layer."""
    m = v = torch.zeros_like(x)
    for t, g in enumerate(steps, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        r = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)
        update = r + weight_decay * x if adapts else r
        size, length = float((x**2).sum() ** 0.5), float((update**2).sum() ** 0.5)
        ratio = min(max(size, bounds[0]), bounds[1]) / length if adapts and size > 0 and length > 0 else 1.0
        x = x - lr * ratio * update
    return x


def lars_of_the_paper(
    w: Tensor,
    steps: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    trust: float = 1e-3,
    adapts: bool,
) -> Tensor:
    """You, Gitman & Ginsburg 2017, algorithm 1, for one layer and a constant rate."""
    v = torch.zeros_like(w)
    for g in steps:
        size, length = float((w**2).sum() ** 0.5), float((g**2).sum() ** 0.5)
        decay = weight_decay if adapts else 0.0
        ratio = trust * size / (length + decay * size) if adapts and size > 0 and length > 0 else 1.0
        v = momentum * v + lr * ratio * (g + decay * w)
        w = w - v
    return w


LAMB = [
    {"lr": 0.02},
    {"lr": 0.02, "adapt_vectors": True, "weight_decay": 0.0},
    {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.5, "norm_bounds": (1.0, 3.0)},
    {"lr": 0.02, "betas": [0.0, 0.99], "adapt_vectors": True},
]
LARS = [
    {"lr": 3.0},
    {"lr": 3.0, "adapt_vectors": False},
    {"lr": 3.0, "adapt_vectors": True, "weight_decay": 0.0},
    {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.3, "trust_coefficient": 0.2},
]
PAPERS = [(Lamb, lamb_of_the_paper, one) for one in LAMB] + [(Lars, lars_of_the_paper, one) for one in LARS]
NAMES = {"norm_bounds": "bounds", "trust_coefficient": "trust"}


@pytest.mark.parametrize(("kind", "paper", "options"), PAPERS, ids=lambda one: str(getattr(one, "__name__", one))[:60])
def test_each_step_is_that_of_the_paper(kind: Any, paper: Any, options: dict[str, Any]) -> None:
    parameters = layers()
    steps = [gradients(step, parameters) for step in range(6)]
    named = {NAMES.get(name, name): value for name, value in options.items() if name != "adapt_vectors"}
    adapts_all = options.get("adapt_vectors", kind is Lars)
    wanted = [
        paper(p.detach(), [one[n] for one in steps], adapts=adapts_all or p.dim() >= 2, **named)
        for n, p in enumerate(parameters)
    ]
    before = [p.detach().clone() for p in parameters]
    optimizer = kind(parameters, **options)
    step_with(optimizer, parameters, steps)
    for found, expected, first in zip(parameters, wanted, before, strict=True):
        assert relative_error(found.detach(), expected) <= 1e-12
        assert not torch.equal(found, first)


def step_with(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for of_step in steps:
        for p, g in zip(parameters, of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, g in zip(parameters, of_step, strict=True):
            assert torch.equal(p.grad, g)  # the optimizer leaves the gradients as they are


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_groups_and_parameters_without_a_gradient(kind: Any) -> None:
    parameters, alone = layers(), layers()
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5, "weight_decay": 0.2}]
    optimizer = kind(groups, lr=0.1)
    others = [kind(alone[:2], lr=0.1), kind(alone[2:], lr=0.5, weight_decay=0.2)]
    for step in range(4):
        for p, q, g in zip(parameters, alone, gradients(step, parameters), strict=True):
            p.grad, q.grad = (None, None) if step == 1 and p.dim() == 1 else (g, g)
        for one in (optimizer, *others):
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, alone, strict=True))
    assert optimizer.state[parameters[1]].get("step", 3) == 3  # it counts its own steps


class Operations(TorchDispatchMode):
    """Counts torch's operations, and those that bring a value of a tensor to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.syncs = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.syncs += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_a_step_waits_for_nothing_and_has_as_many_operations_for_many_parameters(kind: Any) -> None:
    counts = []
    for num_parameters in (3, 30):
        parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(num_parameters)]
        optimizer = kind(parameters, lr=0.1)
        for p in parameters:
            p.grad = torch.randn(4, 4)
        optimizer.step()  # makes the state
        with Operations() as seen:
            optimizer.step()
        assert seen.syncs == 0
        counts.append(seen.count)
    assert counts[0] == counts[1]
    with Operations() as seen:
        parameters[0].sum().item()
    assert seen.syncs == 1


WRONG = [
    (Lamb, {"lr": -1.0}, r"optimizer\.lr=-1\.0; it must be a finite number ≥ 0"),
    (Lamb, {"betas": (0.9, 1.0)}, r"optimizer\.betas\[1\]=1\.0; it must be from 0 to below 1"),
    (Lamb, {"betas": 0.9}, r"optimizer\.betas=0\.9; it takes two numbers"),
    (Lamb, {"eps": math.nan}, "optimizer.eps=nan"),
    (Lamb, {"norm_bounds": (3, 1)}, "0 ≤ least < most"),
    (Lamb, {"norm_bounds": [1]}, "it takes two numbers"),
    (Lamb, {"adapt_vectors": "no"}, "optimizer.adapt_vectors=no: it takes True or False"),
    (Lars, {"lr": "fast"}, "optimizer.lr=fast: it takes a number"),
    (Lars, {"lr": 1.0, "momentum": 1.0}, "optimizer.momentum=1.0"),
    (Lars, {"lr": 1.0, "weight_decay": math.inf}, "optimizer.weight_decay=inf"),
    (Lars, {"lr": 1.0, "trust_coefficient": -1}, "optimizer.trust_coefficient=-1"),
]


@pytest.mark.parametrize(("kind", "options", "message"), WRONG)
def test_options_that_make_no_sense_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        kind(layers(), **options)
    with pytest.raises(mbgd.UsageError, match=message):
        kind([{"params": layers(), **options}], lr=1.0)


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_complex_parameters_are_refused(kind: Any) -> None:
    with pytest.raises(mbgd.UsageError, match=r"takes real parameters; one is torch\.complex64"):
        kind([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], lr=1.0)


# Muon with AdamW


class Named(nn.Module):
    """A model with parameters of given names and shapes, of which only the names matter."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, shape in shapes.items():
            module: nn.Module = self
            *path, last = name.split("__")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.randn(shape)))


TRANSFORMER = {
    "wte__weight": (9, 4),
    "h__0__attention__weight": (4, 12),
    "h__0__attention__bias": (12,),
    "h__0__head_norm__weight": (4,),
    "lm_head__weight": (9, 4),
}
HIDDEN = [
    (TRANSFORMER, None, ["h.0.attention.weight"]),
    (TRANSFORMER, ["lm_head.weight"], ["wte.weight", "h.0.attention.weight"]),
    (TRANSFORMER, "*e*", None),
    (TRANSFORMER, [], ["wte.weight", "h.0.attention.weight", "lm_head.weight"]),
    ({"0__weight": (3, 3), "0__bias": (3,), "2__weight": (3, 3), "4__weight": (2, 3)}, None, ["0.weight", "2.weight"]),
    ({"conv__weight": (4, 3, 3, 3), "fc__weight": (2, 4)}, None, None),
    ({"output__weight": (3, 3)}, None, None),
]


@pytest.mark.parametrize(("shapes", "adamw_for", "hidden"), HIDDEN)
def test_which_parameters_muon_updates(shapes: Any, adamw_for: Any, hidden: list[str] | None) -> None:
    named = list(Named(**shapes).named_parameters())
    if hidden is None:
        with pytest.raises(mbgd.UsageError, match="Muon would update no parameter"):
            MuonAdamW(named, adamw_for=adamw_for)
        return
    optimizer = MuonAdamW(named, adamw_for=adamw_for)
    assert optimizer.hidden == hidden
    names = {p: name for name, p in named}
    by_muon = [names[p] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert by_muon == hidden
    assert sorted(names[p] for group in optimizer.param_groups for p in group["params"]) == sorted(names.values())


def test_the_models_that_ship() -> None:
    hidden = {}
    text = ["data=text", f"data.path={CONF / 'train.yaml'}", "data.context=8", "model.num_layers=1"]
    for name, more in (("mlp", ["model.hidden=[8,8]"]), ("cnn", []), ("gpt", text)):
        trainer = build_trainer(typed(composed("optimizer=muon", f"model={name}", *more)), mbgd.Workers())
        optimizer: Any = trainer.setup.optimizer
        hidden[name] = optimizer.hidden
        assert f"Muon for {', '.join(optimizer.hidden)}" in plan_lines(trainer)["optimizer"]
    assert hidden["mlp"] == ["layers.0.weight", "layers.2.weight"]
    assert len(hidden["cnn"]) == 1
    assert all(name.startswith("blocks.0.") for name in hidden["gpt"])
    assert len(hidden["gpt"]) == 4
    assert len(set(NOT_HIDDEN)) == len(NOT_HIDDEN)


def test_both_parts_are_torchs_and_groups_change_their_options() -> None:
    model, alone = Named(**TRANSFORMER), Named(**TRANSFORMER)
    named, by_name = dict(model.named_parameters()), dict(alone.named_parameters())
    groups = [{"match": "*.bias", "weight_decay": 0.0, "betas": (0.5, 0.5)}, {"match": "h.*.weight", "lr": 0.3}]
    optimizer = MuonAdamW(named.items(), lr=0.1, adamw_lr=0.01, weight_decay=0.2, groups=groups)
    hidden, bias, norm = (by_name[f"h.0.{one}"] for one in ("attention.weight", "attention.bias", "head_norm.weight"))
    options = {"lr": 0.01, "weight_decay": 0.2, "betas": (0.9, 0.95)}
    others = [
        torch.optim.Muon([hidden], lr=0.3, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([by_name["wte.weight"], by_name["lm_head.weight"]], **options),
        torch.optim.AdamW([bias], **{**options, "weight_decay": 0.0, "betas": (0.5, 0.5)}),
        torch.optim.AdamW([norm], **{**options, "lr": 0.3}),
    ]
    for step in range(4):
        for p, q, g in zip(named.values(), by_name.values(), gradients(step, list(named.values())), strict=True):
            p.grad, q.grad = g, g.clone()
        for one in (optimizer, *others):
            one.step()
    for name in named:
        assert torch.equal(named[name], by_name[name]), name


WRONG_GROUPS = [
    ([{"match": "*.bias", "momentum": 0.5}], r"momentum=0\.5 is no option of AdamW, which updates"),
    ([{"match": "h.0.attention.weight", "betas": [0, 0]}], "is no option of Muon, which"),
    ([{"match": "*", "leraning_rate": 1}], "no option of Muon and AdamW"),
    ([{"match": "*", "weigth_decay": 1}], "Did you mean weight_decay"),
    ([{"match": "*", "use_muon": False}], "use_muon=False is no option of Muon and AdamW"),
    ([{"match": "*.biass", "lr": 1}], r"optimizer\.groups\[0\]\.match: no parameter's name matches"),
]


@pytest.mark.parametrize(("groups", "message"), WRONG_GROUPS)
def test_mistakes_in_groups_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        MuonAdamW(Named(**TRANSFORMER).named_parameters(), groups=groups)


def test_other_mistakes_with_muon_are_refused() -> None:
    named = list(Named(**TRANSFORMER).named_parameters())
    with pytest.raises(mbgd.UsageError, match=r"optimizer\.adamw_for: no parameter's name matches 'lm_haed\.\*'"):
        MuonAdamW(named, adamw_for=["lm_haed.*"])
    with pytest.raises(mbgd.UsageError, match="Adjust learning rate function match"):
        MuonAdamW(named, adjust_lr_fn="match")
    own = ["optimizer=own", "optimizer._target_=torch.optim.Muon", "+optimizer.lr=0.1"]
    with pytest.raises(mbgd.UsageError, match="Use optimizer=muon, which gives the hidden matrices to Muon"):
        build_trainer(typed(composed(*own)), mbgd.Workers())


def test_groups_through_the_configuration_and_their_notes() -> None:
    groups = 'optimizer.groups=[{match:"*.bias",weight_decay:0.0},{match:"layers.0.*",lr:0.5}]'
    trainer = build_trainer(typed(composed("optimizer=muon", groups)), mbgd.Workers())
    found = [(one["use_muon"], one["lr"], one["weight_decay"]) for one in trainer.setup.optimizer.param_groups]
    assert found == [(True, 0.5, 0.01), (False, 0.01, 0.01), (False, 0.01, 0.0)]
    assert ["also matches layers.0.bias" in one for one in trainer.setup.warnings] == [True]


# Workers, and resuming


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3)).double()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lamb": lambda model: Lamb(model.parameters(), lr=0.05),
    "lars": lambda model: Lars(model.parameters(), lr=20.0),
    "muon": lambda model: MuonAdamW(model.named_parameters(), lr=0.05),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, fused=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05),
}
AVERAGINGS = ("ddp", "shared_memory", "reproducible")


def make_trainer(workers: mbgd.Workers, name: str, averaging: str) -> mbgd.Trainer:
    model = make_model()
    return mbgd.Trainer(
        model,
        partial(objective, uniform),
        OPTIMIZERS[name](model),
        mbgd.Data(train=Rows(*rows("uniform", NUM_EXAMPLES))),
        mbgd.Settings(
            seed=SEED,
            steps=STEPS,
            batch=mbgd.Batch(MINIBATCH),
            precision="fp64",  # type: ignore[arg-type]
            averaging=mbgd.Averaging(averaging),  # type: ignore[arg-type]
            check=mbgd.Check(replicas_every_steps=2),
            schedule=mbgd.schedule.WSD(num_steps=STEPS, warmup_steps=2),
        ),
        workers,
    )


def trained(trainer: mbgd.Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.setup.model.parameters()).detach()


def train_all(workers: mbgd.Workers, folder: str) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """For each optimizer and averaging: the parameters of a whole run, and of one that goes on from a checkpoint.

    The checkpoint is the one in the folder, which a run on one worker left there, or, on one worker, is written now.
    """
    found = {}
    for name in OPTIMIZERS:
        for averaging in AVERAGINGS:
            whole = make_trainer(workers, name, averaging)
            whole.fit()
            path = Path(folder, f"{name}-{averaging}")
            if workers.num_workers == 1:
                stopped = make_trainer(workers, name, averaging)
                with pytest.raises(Preempted):
                    stopped.fit(None, mbgd.Checkpoints(path, stopped), StopAt(3))
            resumed = make_trainer(workers, name, averaging)
            assert mbgd.Checkpoints(path, resumed).resume()
            assert resumed.state.step == 3
            resumed.fit()
            found[name, averaging] = trained(whole), trained(resumed)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[tuple[str, str], tuple[Tensor, Tensor]]]]:
    """By the number of workers, for each worker."""
    folder = str(tmp_path_factory.mktemp("runs"))
    return {num_workers: run_workers(train_all, num_workers, folder) for num_workers in (1, 2, 3)}


@cache
def in_plain_torch(name: str) -> Tensor:
    order, plan = Order(NUM_EXAMPLES, SEED), Plan(num_examples=NUM_EXAMPLES, minibatch_size=MINIBATCH, num_workers=1)
    minibatches = [order.indices(*plan.minibatch(step)).tolist() for step in range(STEPS)]
    model, schedule = make_model(), mbgd.schedule.WSD(num_steps=STEPS, warmup_steps=2)

    def make_optimizer(_: Any) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[name](model)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        optimizer.register_step_post_hook(lambda *_: rates.step())
        return optimizer

    reference.train(model, uniform, rows("uniform", NUM_EXAMPLES), minibatches, make_optimizer)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_number_of_workers_equals_one_process_and_a_resume_changes_nothing(
    results: Any, name: str, averaging: str, num_workers: int
) -> None:
    wanted = in_plain_torch(name)
    assert relative_error(wanted, nn.utils.parameters_to_vector(make_model().parameters()).detach()) > 1e-2
    whole, resumed = results[num_workers][0][name, averaging]
    assert relative_error(whole, wanted) <= 1e-12
    assert relative_error(resumed, wanted) <= 1e-12
    for of_worker in results[num_workers]:
        assert torch.equal(of_worker[name, averaging][0], whole)
        assert torch.equal(of_worker[name, averaging][1], resumed)
    if averaging == "reproducible":
        assert torch.equal(whole, results[1][0][name, averaging][0])
    if averaging == "reproducible" or num_workers == 1:
        assert torch.equal(resumed, whole)


@pytest.mark.parametrize("name", ["lamb", "lars", "muon"])
def test_a_state_that_does_not_fit_is_refused_by_name(name: str) -> None:
    model = make_model()
    optimizer, before = OPTIMIZERS[name](model), [p.detach().clone() for p in model.parameters()]
    state = OptimizerState(optimizer, has_schedule=True)
    assert state.mismatches({}, state.values()) == []  # by a trial step of a copy,
    assert not optimizer.state  # which leaves state
    assert all(map(torch.equal, before, model.parameters()))  # and parameters as they were
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors, values = state.tensors(), state.values()
    assert state.problems() == state.mismatches(tensors, values) == []
    first = next(key for key, one in tensors.items() if one.dim() == 2)
    [problem] = state.mismatches({**tensors, first: tensors[first][:1]}, values)
    assert f"optimizer state {first}: shape (1, " in problem
    number = next(index for index, (key, _) in enumerate(values["state"]) if first.startswith(f"{key}."))
    key, of_parameter = values["state"][number]
    left = {"dict": [pair for pair in of_parameter["dict"] if pair[0] != first.partition(".")[2]] + [["more", 1]]}
    lacking = {**values, "state": [*values["state"][:number], [key, left], *values["state"][number + 1 :]]}
    found = state.mismatches({name: one for name, one in tensors.items() if name != first}, lacking)
    assert found == [f"optimizer state {first} is missing"]


@pytest.mark.parametrize("name", ["lamb", "lars", "muon", "adafactor"])
def test_every_precision_trains_alike(name: str) -> None:
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        overrides = [f"optimizer={name}", f"precision={precision}", "steps=30", "data.evaluation=null"]
        losses[precision] = build_trainer(typed(composed(*overrides)), mbgd.Workers()).fit().metrics["train/loss"]
    assert losses["fp32"] < 2.1  # ln 10 = 2.3 without training
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)


# Rates that follow the minibatch's size


SIZES = [(512, 256), (64, 256), (100, 100)]


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_the_linear_rule(size: int, batch: int) -> None:
    parameters = layers()
    for optimizer in (
        torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}], lr=0.1, momentum=0.9),
        torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}], lr=0.1),
    ):
        before = [{k: v for k, v in group.items() if k != "lr"} for group in optimizer.param_groups]
        scale_lr(optimizer, size=size, batch=batch, rule="linear")
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.1 * size / batch, 0.5 * size / batch])
        assert [{k: v for k, v in group.items() if k != "lr"} for group in optimizer.param_groups] == before


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_the_square_root_rule(size: int, batch: int) -> None:
    # Malladi et al. 2022, definition 5.2 and 5.3, with κ = size / batch.
    kappa = size / batch
    named = list(Named(**TRANSFORMER).named_parameters())
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        adam = kind(layers(), lr=0.1, betas=(0.9, 0.98), eps=1e-7)
        scale_lr(adam, size=size, batch=batch, rule="sqrt")
        [group] = adam.param_groups
        assert group["lr"] == pytest.approx(0.1 * kappa**0.5)
        assert group["betas"] == pytest.approx((1 - kappa * 0.1, 1 - kappa * 0.02))
        assert group["eps"] == pytest.approx(1e-7 / kappa**0.5)
    rmsprop = torch.optim.RMSprop(layers(), lr=0.1, alpha=0.97, eps=1e-7)
    muon = MuonAdamW(named, lr=0.1, betas=(0.9, 0.98), eps=1e-7)
    scale_lr(rmsprop, size=size, batch=batch, rule="sqrt")
    scale_lr(muon, size=size, batch=batch, rule="sqrt")
    assert rmsprop.param_groups[0]["alpha"] == pytest.approx(1 - kappa * 0.03)
    assert rmsprop.param_groups[0]["eps"] == pytest.approx(1e-7 / kappa**0.5)
    of_muon, of_adamw = muon.param_groups
    assert (of_muon["lr"], of_muon["eps"], of_muon["momentum"]) == pytest.approx((0.1 * kappa**0.5, 1e-7, 0.95))
    assert of_adamw["betas"] == pytest.approx((1 - kappa * 0.1, 1 - kappa * 0.02))
    for optimizer in (Lamb(layers(), lr=0.1), Lars(layers(), lr=0.1), torch.optim.SGD(layers(), lr=0.1)):
        before = dict(optimizer.param_groups[0])
        scale_lr(optimizer, size=size, batch=batch, rule="sqrt")
        assert optimizer.param_groups[0] == {**before, "lr": pytest.approx(0.1 * kappa**0.5)}


def test_a_run_is_that_with_the_scaled_values_and_its_plan_tells_them() -> None:
    def run(*overrides: str) -> mbgd.Trainer:
        trainer = build_trainer(typed(composed("steps=5", "batch.size=128", *overrides)), mbgd.Workers())
        trainer.fit()
        return trainer

    scaled = run("optimizer.lr_scale_with={batch: 64, rule: sqrt}")
    rate, eps = 0.01 * 2**0.5, 1e-8 / 2**0.5
    betas = [1 - 2 * (1 - beta) for beta in (0.9, 0.999)]
    by_hand = run(f"optimizer.lr={rate}", f"optimizer.betas={betas}", f"optimizer.eps={eps}")
    assert torch.equal(trained(scaled), trained(by_hand))
    assert not torch.equal(trained(scaled), trained(run()))
    told = plan_lines(scaled)["optimizer"]
    assert told == ("AdamW, lr 0.01414, scaled by 1.414 (sqrt: batch.size 128 / 64), betas 0.8, 0.998, eps 7.071e-09")
    assert plan_lines(by_hand)["optimizer"] == "AdamW, lr 0.01414"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3", r"lr_scale_with=3; it takes the size of the minibatch .* such as \{batch: 256, rule: linear\}"),
        ("{batch: 256}", "it takes the size of the minibatch"),
        ("{batch: 256, rule: linear, momentum: 1}", "it takes the size of the minibatch"),
        ("{batch: 0, rule: linear}", "batch=0; a minibatch has at least 1 example"),
        ("{batch: 1.5, rule: linear}", "batch=1.5: it takes a whole number"),
        ("{batch: 64, rule: sqr}", "rule=sqr; it is one of linear, sqrt. Did you mean sqrt"),
        ("{batch: 4, rule: sqrt}", "16 times as large the rule sqrt turns 0.9 in optimizer.betas into -0.6"),
    ],
)
def test_mistakes_in_the_rule_are_refused(value: str, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        build_trainer(typed(composed(f"optimizer.lr_scale_with={value}")), mbgd.Workers())


# What cannot be trained with


def test_an_optimizer_that_needs_a_closure_is_refused_with_the_reason() -> None:
    own = ["optimizer=own", "optimizer._target_=torch.optim.LBFGS", "+optimizer.lr=0.1"]
    with pytest.raises(mbgd.UsageError, match=r"LBFGS computes the loss several times .* takes a closure"):
        build_trainer(typed(composed(*own)), mbgd.Workers())
