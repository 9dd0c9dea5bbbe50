"""Configuration → objects. The only module that knows Hydra and OmegaConf."""

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mbgd import averaging, profiling, saving
from mbgd.config import Config, Run, problems
from mbgd.errors import UsageError
from mbgd.loader import Data
from mbgd.plan import count_steps, make_plan
from mbgd.suggestions import did_you_mean
from mbgd.task import Task
from mbgd.trainer import Trainer
from mbgd.workers import Workers

FROM_DATA = ("input_shape", "num_outputs")
"""Arguments of a model that are taken from the training dataset where the configuration has null."""


def typed(composed: DictConfig) -> Config:
    """The configuration as typed settings; UsageError naming everything that is wrong with it at once."""
    composed = composed.copy()
    found = []
    for key in _missing_keys(OmegaConf.to_container(composed)):
        found.append(f"{key} has no value. Give it one: {key}=…")
        OmegaConf.update(composed, key, None)  # so that what refers to it resolves, and other mistakes show too
    schema = values = OmegaConf.structured(Config)
    _make_writable(schema)  # frozen classes make read-only sections, into which nothing can be merged
    for path, part in _parts(OmegaConf.to_container(composed, resolve=True), schema):
        try:
            values = OmegaConf.merge(values, part)
        except OmegaConfBaseException as error:
            reason = str(error.msg or error).splitlines()[0]
            meant = did_you_mean(*_mistyped(path, reason, part, schema))
            found.append(f"{path}: {reason}.{meant} `python train.py --cfg job` shows every key and its value.")
    config = OmegaConf.to_object(values)
    assert isinstance(config, Config)
    found += problems(config)
    if found:
        raise UsageError("the configuration has mistakes:\n" + "\n".join(f"  - {problem}" for problem in found))
    return config


def _mistyped(path: str, reason: str, part: Any, schema: DictConfig) -> tuple[str, list[str]]:
    """The key or value that is refused, and the valid ones where there is a choice."""
    if choices := re.search(r"expected one of \[(.*)\]", reason):
        for key in path.split("."):
            part = part[key]
        return str(part), choices[1].split(", ")
    sections = {str(key): node for key, node in schema.items() if isinstance(node, DictConfig)}
    keys = [str(key) for key in schema] + [f"{key}.{inner!s}" for key, node in sections.items() for inner in node]
    return path, keys if reason.startswith("Key ") else []


def _make_writable(section: DictConfig) -> None:
    OmegaConf.set_readonly(section, False)
    for value in section.values():
        if isinstance(value, DictConfig):
            _make_writable(value)


def _missing_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Keys whose value is ???. (OmegaConf.missing_keys stops at interpolations that lead to one.)"""
    if node == "???":
        yield prefix.removesuffix(".")
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _missing_keys(value, f"{prefix}{key}.")


def _parts(values: Any, schema: DictConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, what to merge) for each typed value; a node that the schema leaves open comes as a whole."""
    for key, value in values.items():
        if isinstance(schema.get(key) if key in schema else None, DictConfig) and isinstance(value, dict):
            for inner_key, inner_value in value.items():
                yield f"{key}.{inner_key}", {key: {inner_key: inner_value}}
        else:
            yield str(key), {key: value}


def resolved_yaml(composed: DictConfig) -> str:
    """The whole configuration as text, with every reference resolved."""
    return OmegaConf.to_yaml(composed, resolve=True)


def run_name(run: Run, choices: Mapping[str, Any]) -> str:
    """What the run is called where it has no name: its experiment, or its model and data, as chosen of the groups."""
    experiment = choices.get("experiment")
    chosen = [experiment] if experiment not in (None, "null") else [choices.get("model"), choices.get("data")]
    return run.name or "-".join(str(one).replace("/", "-") for one in chosen)


def build_trainer(config: Config, workers: Workers) -> Trainer:
    """The trainer that the configuration describes, on this worker."""
    torch.manual_seed(config.seed)
    averaging.fix_threads(config.averaging, workers.device)
    data = build_data(config)
    from_data = {key: getattr(data.train, key, None) for key in FROM_DATA if config.model.get(key, ...) is None}
    model = make("model", config.model, **from_data)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; it must be a torch.nn.Module.")
    objective = make("objective", config.objective, _partial_=_is_function(config.objective))
    optimizer = make("optimizer", config.optimizer, Task(model, objective).trainable())
    plan = make_plan(config, len(data.train), workers.num_workers)
    schedule = None
    if config.schedule is not None:
        schedule = make("schedule", config.schedule, num_steps=count_steps(config, plan))
    metrics = {name: make(f"evaluation.metrics.{name}", node) for name, node in config.evaluation.metrics.items()}
    evaluation = dataclasses.replace(config.evaluation, metrics=metrics)
    settings = dataclasses.replace(config, schedule=schedule, evaluation=evaluation)
    trainer = Trainer(model, objective, optimizer, data, settings, workers)
    saving.check(config.checkpoint, trainer.evaluation_names)
    profiling.check(config.profile, trainer.num_steps)
    return trainer


def build_data(config: Config) -> Data:
    """The datasets; those held in memory keep their floating values in the precision's dtype."""
    node = config.data
    datasets = {}
    for split in ("train", "evaluation"):
        dataset = make(f"data.{split}", node[split]) if node.get(split) is not None else None
        datasets[split] = dataset
    return Data(**datasets, shuffle=node.get("shuffle", True), num_workers=node.get("num_workers", 0))


def _is_function(node: Any) -> bool:
    """Whether the target is itself an objective, not what makes one."""
    try:
        return isinstance(node, dict) and isinstance(get_object(node["_target_"]), FunctionType)
    except Exception:  # what is wrong with the target, `make` says
        return False


def make(name: str, node: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call the node's `_target_`; its mistakes are the user's to mend, so they become UsageErrors."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise UsageError(f"{name} has no _target_; it must name the class or function that makes it.")
    try:
        return instantiate(node, *arguments, **keywords)
    except InstantiationException as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        reason: BaseException = error  # Hydra's own message tells less than the exception at the bottom
        while reason.__cause__ is not None:
            reason = reason.__cause__
        remedy = _remedy(reason) if isinstance(reason, ModuleNotFoundError) else ""
        raise UsageError(
            f"{name} ({node['_target_']}) cannot be made: {type(reason).__name__}: {reason}{remedy}"
        ) from error


def _remedy(error: ModuleNotFoundError) -> str:
    """What to do about a `_target_` that leads to no module."""
    if error.name == "torchmetrics":
        return ". Use pip install 'mbgd[metrics]'."
    module, _, last = (error.name or "").rpartition(".")
    if module in sys.modules:  # there is the module, without anything of that name
        return f".{did_you_mean(last, dir(sys.modules[module]))}"
    return ". Is its folder on PYTHONPATH?"
