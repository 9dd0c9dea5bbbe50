"""Parts of the user's own, by `_target_`: what they are given, and what is said of keys and values that do not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from test_configuration import composed
from torch import Tensor, nn

import mbgd
from mbgd.building.build import build_trainer, make, typed
from mbgd.building.references import referred
from mbgd.checks import optimizers

HERE = "test_own_parts"


class Recorded:
    """Keeps what it was given."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        type(self).given = given


class Net(Recorded, nn.Module):
    def __init__(self, **given: Any) -> None:
        nn.Module.__init__(self)
        Recorded.__init__(self, **given)
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs.flatten(1))
        return outputs


class Examples(Recorded):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(64), torch.tensor(index)


class Objective(mbgd.CrossEntropy):
    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        super().__init__()
        type(self).given = given


class Sgd(torch.optim.SGD):
    given: dict[str, Any]

    def __init__(self, parameters: list[nn.Parameter], **given: Any) -> None:
        assert type(parameters) is list
        super().__init__(parameters, lr=0.1)
        type(self).given = given


class Schedule(Recorded):
    def __call__(self, step: int) -> float:
        return 1.0


class Metric(Recorded):
    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> float:
        return 0.0

    def reset(self) -> None: ...


class Inner(Recorded):
    pass


def assert_plain(value: Any) -> None:
    assert type(value) in (dict, list, int, str, type(None), Inner), type(value)
    for one in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        assert_plain(one)


NESTED = f"{{sizes: [1, [2, 3]], inner: {{a: [{{b: c}}]}}, made: {{_target_: {HERE}.Inner, x: [1, {{y: [2]}}]}}}}"


def test_own_parts_are_given_plain_lists_and_dicts() -> None:
    overrides = ["steps=1", "batch.size=8"]
    for group, part in (("model", "Net"), ("objective", "Objective"), ("optimizer", "Sgd"), ("schedule", "Schedule")):
        overrides += [f"{group}=own", f"{group}._target_={HERE}.{part}", f"+{group}.options={NESTED}"]
    overrides += ["data=own", f"data.train._target_={HERE}.Examples", f"+data.train.options={NESTED}"]
    overrides += [f"data.evaluation={{_target_: {HERE}.Examples, options: {NESTED}}}"]
    overrides += [f"+evaluation.metrics.own={{_target_: {HERE}.Metric, options: {NESTED}}}"]
    result = build_trainer(typed(composed(*overrides)), mbgd.Workers()).fit()
    assert result.steps == 1
    for part in (Net, Examples, Objective, Sgd, Schedule, Metric):
        options = part.given["options"]
        assert_plain(options)
        assert options["sizes"] == [1, [2, 3]]
        assert options["inner"] == {"a": [{"b": "c"}]}
    assert_plain(Inner.given)
    assert Inner.given == {"x": [1, {"y": [2]}]}


class Strict:
    def __init__(
        self, width: int, *, depth: int = 1, names: list[str] | None = None, sizes: Sequence[int] = ()
    ) -> None:
        self.total = sum(sizes)
        if names is not None:
            ", ".join(names)
        self.rows = [0] * width


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {"width": 1, "detph": 2},
            ["does not take detph", "it takes width, depth, names, sizes", "Did you mean part.depth?"],
        ),
        ({"width": 1, "other": 2}, ["does not take other", "~part.other"]),
        ({"depth": 2}, ["needs width", "+part.width=…"]),
        ({"width": "x"}, ["part.width=x; it takes a number"]),
        ({"width": 1, "sizes": 3}, ["part.sizes=3; it takes a list of numbers, such as part.sizes=[3]"]),
        ({"width": [3]}, ["part.width=[3]; it takes a number"]),
        ({"width": 1, "names": 3}, ["part.names=3; it takes a list of texts"]),
        ({"width": 1, "names": ["a", 3]}, ["part.names=['a', 3]; it takes a list of texts"]),
        (
            {"width": 1, "depth": {"_target_": f"{HERE}.Strict", "widht": 1}},
            ["part.depth: ", "Did you mean part.depth.w"],
        ),
        ({"width": 1, "_recursive_": 3}, ["_recursive_ flag must be a bool"]),
    ],
)
def test_keys_and_values_that_a_target_does_not_take(keys: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(mbgd.UsageError) as caught:
        make("part", {"_target_": f"{HERE}.Strict", **keys})
    for part in parts:
        assert part in str(caught.value)


def test_what_a_target_takes_is_not_refused() -> None:
    assert make("part", {"_target_": f"{HERE}.Strict", "width": True, "depth": 1.5, "names": ["a"]})
    assert make("part", {"_target_": f"{HERE}.Strict", "_args_": [2]}).rows == [0, 0]
    assert make("part", {"_target_": "builtins.dict", "anything": 1}) == {"anything": 1}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["+data.shufle=false"], ["data.shufle", "Did you mean data.shuffle?"]),
        (["+data.evaluaton=null"], ["data.evaluaton", "Did you mean data.evaluation"]),
        (["+data.num_worker=4"], ["data.num_worker:", "Did you mean data.num_workers?"]),
        (["+data.batch_sizee=3", "+data.sampler=x"], ["data.batch_sizee", "Did you mean batch.size?", "data.sampler"]),
        (["+data.helper=3", "+data.other=${data.shuffle}"], ["data.helper: ", "data.other: "]),
        (["model.dropout=${model.drop}"], ["model.dropout refers", "Did you mean model.dropout?"]),
        (["+data.path=3", "run.name='data.path${oc.env:HOME}'"], ["data.path"]),
        (["data.shuffle=maybe"], ["data.shuffle=maybe: it takes True or False"]),
        (["data.num_workers=1.5"], ["data.num_workers=1.5: it takes a whole number"]),
        (["data.train=null"], ["nothing to train on"]),
        (["~data"], ["data=None"]),
        (["~model"], ["model=None"]),
        (["+tracking.wandb.mod=x"], ["tracking.wandb.mod: ", "Did you mean tracking.wandb.mode"]),
        (["tracking.wandb.mode=onlin"], ["Did you mean online or offline?"]),
        (["+evaluation.every_step=3"], ["Did you mean evaluation.every_steps?"]),
        (["batch.size="], ["It takes a whole number"]),
        (["batch.size=1e3"], ["It takes a whole number"]),
        (["max_grad_norm=x"], ["It takes a number"]),
        (["run.dir="], ["run.dir is empty"]),
        (["batch=3"], ["It is a section"]),
        (["tracking.wandb.tags=a"], ["It takes a list"]),
        (["evaluation.metrics=null"], ["It cannot be null"]),
        (["precision=FP64"], ["Did you mean fp64?"]),
        (["backend.timeout_seconds=0"], ["backend.timeout_seconds=0"]),
        (["checkpoint.every_seconds=inf"], ["checkpoint.every_seconds=inf"]),
    ],
    ids=lambda value: value[0],
)
def test_what_no_node_of_the_configuration_knows(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(mbgd.UsageError) as caught:
        typed(composed(*overrides))
    for part in parts:
        assert part in str(caught.value)


def test_helper_keys_of_an_own_data_group_may_be_referred_to() -> None:
    plain = {"data": {"train": "${data.a}", "a": "${.c}/x", "c": 1, "deep": {"x": "${..d}"}, "d": 1, "e": 1}}
    assert referred(plain, "data", plain["data"]) == {"a", "c", "d"}
    assert referred({"x": "${oc.select:data.k,null}", "data": {"k": 1}}, "data", {"k"}) == {"k"}
    assert referred({"x": "data.k", "y": "${data2.k}", "data": {"k": 1}}, "data", {"k"}) == set()
    assert referred({"x": ["${data}"], "data": {"k": 1}}, "data", {"k"}) == {"k"}
    assert referred({"x": "${data.${y}}", "data": {"k": 1}}, "data", {"k"}) == {"k"}
    assert referred({"x": "${data[k]}", "data": {"k": 1}}, "data", {"k"}) == {"k"}


def test_optimizers_with_their_own_keys_train() -> None:
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"):
        config = typed(composed("steps=2", "optimizer=own", f"optimizer._target_=torch.optim.{name}"))
        trainer = build_trainer(config, mbgd.Workers())
        before = [parameter.detach().clone() for parameter in trainer.setup.model.parameters()]
        trainer.fit()
        moved = zip(before, trainer.setup.model.parameters(), strict=True)
        assert all(not torch.equal(was, parameter) for was, parameter in moved), name


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]


def no_optimizer(parameters: Any) -> int:
    return len(parameters)


@pytest.mark.parametrize(
    ("target", "keys", "parts"),
    [
        ("torch.optim.LBFGS", [], ["closure", "computes the loss several times"]),
        (f"{HERE}.NeedsClosure", [], ["closure"]),
        ("torch.optim.SparseAdam", [], ["takes only sparse gradients"]),
        ("torch.optim.Muon", [], ["takes only matrices", "layers.0.bias, layers.2.bias"]),
        (f"{HERE}.WithoutRate", [], ["has lr=None"]),
        (f"{HERE}.no_optimizer", [], ["is a int; it must be a torch.optim.Optimizer"]),
        ("torch.optim.SGD", ["+optimizer.lr=nan"], ["lr=nan"]),
        ("torch.optim.SGD", ["+optimizer.lr=fast"], ["optimizer.lr=fast; it takes a number"]),
        ("torch.optim.RMSprop", ["+optimizer.betas=[0.9,0.9]"], ["RMSprop does not take betas", "~optimizer.betas"]),
    ],
)
def test_optimizers_that_cannot_be_driven(target: str, keys: list[str], parts: list[str]) -> None:
    config = typed(composed("optimizer=own", f"optimizer._target_={target}", *keys))
    with pytest.raises(mbgd.UsageError) as caught:
        build_trainer(config, mbgd.Workers())
    for part in parts:
        assert part in str(caught.value)


def test_keys_left_of_another_optimizer_are_all_named() -> None:
    with pytest.raises(mbgd.UsageError, match=r"does not take betas, fused.*~optimizer.betas ~optimizer.fused"):
        build_trainer(typed(composed("optimizer._target_=torch.optim.RMSprop")), mbgd.Workers())
    with pytest.raises(mbgd.UsageError, match="closure"):  # which no leaving out of keys mends
        build_trainer(typed(composed("optimizer._target_=torch.optim.LBFGS")), mbgd.Workers())


def test_an_optimizer_of_the_librarys_user_is_checked_alike() -> None:
    with pytest.raises(mbgd.UsageError, match="closure"):
        optimizers.check(torch.optim.LBFGS([torch.zeros(2, requires_grad=True)]))
    optimizers.check(torch.optim.AdamW([torch.zeros(2, requires_grad=True)]))
