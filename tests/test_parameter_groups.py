"""Options of the optimizer for some parameters, by patterns of their names."""

from typing import Any

import pytest
import torch
from test_configuration import composed
from torch import Tensor, nn

import mbgd
from mbgd.building.build import build_trainer, typed
from mbgd.task.parameter_groups import parameter_groups

from processes import run_workers

GROUPS = 'optimizer.groups=[{match:["*.bias"],weight_decay:0.0},{match:"layers.1.*",lr:0.001}]'
STEPS = ["steps=6", "epochs=null", "batch.size=32", "schedule=constant", "optimizer.weight_decay=0.5"]


def named_decay(named_parameters: Any, lr: float) -> torch.optim.Optimizer:
    """A factory of a user's own: decay for matrices alone."""
    matrices = [parameter for _, parameter in named_parameters if parameter.dim() > 1]
    others = [parameter for name, parameter in named_parameters if name.endswith("bias")]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def train(workers: mbgd.Workers, *overrides: str) -> tuple[Tensor, list[str]]:
    trainer = build_trainer(typed(composed(*STEPS, *overrides)), workers)
    trainer.fit()
    return nn.utils.parameters_to_vector(trainer.setup.model.parameters()).detach(), trainer.setup.warnings


def by_hand(workers: mbgd.Workers, pattern: str) -> Tensor:
    trainer = build_trainer(typed(composed(*STEPS)), workers)
    setup, prefix = trainer.setup, pattern.removesuffix("*")
    named = setup.trained.by_name
    biases = [p for name, p in named.items() if name.endswith(".bias")]
    last = [p for name, p in named.items() if name.startswith(prefix) and not name.endswith(".bias")]
    rest = [p for name, p in named.items() if not name.startswith(prefix) and not name.endswith(".bias")]
    groups = [{"params": rest}, {"params": biases, "weight_decay": 0.0}, {"params": last, "lr": 0.001}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5, eps=1e-8, fused=True)
    mbgd.Trainer(setup.model, mbgd.CrossEntropy(), optimizer, setup.data, setup.settings, workers).fit()
    return nn.utils.parameters_to_vector(setup.model.parameters()).detach()


def names_of_model() -> list[str]:
    return list(build_trainer(typed(composed(*STEPS)), mbgd.Workers()).setup.trained.by_name)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_groups_are_those_that_one_would_make_by_hand(num_workers: int) -> None:
    names = names_of_model()
    pattern = f"{names[-1].rpartition('.')[0]}.*"
    groups = f'optimizer.groups=[{{match:["*.bias"],weight_decay:0.0}},{{match:"{pattern}",lr:0.001}}]'
    found, notes = run_workers(train, num_workers, groups)[0]
    wanted = run_workers(by_hand, num_workers, pattern)[0]
    assert torch.equal(found, wanted)
    assert len(notes) == 1
    assert f"also matches {names[-1]}" in notes[0]


def test_a_factory_gets_named_parameters() -> None:
    own = ["optimizer=own", "optimizer._target_=test_parameter_groups.named_decay", "+optimizer.lr=0.01"]
    steps = [one for one in STEPS if not one.startswith("optimizer.")]
    trainer = build_trainer(typed(composed(*steps, *own)), mbgd.Workers())
    assert [group["weight_decay"] for group in trainer.setup.optimizer.param_groups] == [0.5, 0.0]
    with pytest.raises(mbgd.UsageError, match="takes named_parameters and so makes groups itself"):
        build_trainer(typed(composed(*steps, *own, "+" + GROUPS)), mbgd.Workers())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ('[{match:"*.biass",lr:1}]', r"no parameter's name matches '\*\.biass'"),
        ('[{match:"*.bias",wd:0}]', r"optimizer\.groups\[0\]\.wd: AdamW has no such option"),
        ('[{match:"*.bias",weight_deccay:0}]', "Did you mean weight_decay"),
        ('[{match:"*.bias"}]', "a group has the key match"),
        ("[{weight_decay:0}]", "a group has the key match"),
        ("[{match:[],lr:1}]", "it takes a pattern or a list"),
        ("[{match:3,lr:1}]", "it takes a pattern or a list"),
        ("[bias]", "a group has the key match"),
    ],
)
def test_a_mistake_is_refused_by_name(groups: str, message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        build_trainer(typed(composed(*STEPS, f"optimizer.groups={groups}")), mbgd.Workers())


def test_every_parameter_is_in_exactly_one_group_and_the_rest_comes_first() -> None:
    named = {name: nn.Parameter(torch.zeros(1)) for name in ("a.weight", "a.bias", "b.weight", "b.bias")}
    made, told = parameter_groups(named, [{"match": "b.*", "lr": 1.0}, {"match": ["*.bias"], "lr": 2.0}])
    held = [[next(n for n, p in named.items() if p is one) for one in group["params"]] for group in made]
    assert held == [["a.weight"], ["b.weight", "b.bias"], ["a.bias"]]
    assert [group.get("lr") for group in made] == [None, 1.0, 2.0]
    assert len(told) == 1


def test_all_parameters_in_groups_leave_no_empty_one() -> None:
    made, _ = parameter_groups({"a": nn.Parameter(torch.zeros(1))}, [{"match": "*", "lr": 1.0}])
    assert [len(group["params"]) for group in made] == [1]
