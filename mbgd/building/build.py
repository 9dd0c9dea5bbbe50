"""Configuration → typed settings and objects: datasets, model, objective, optimizer, trainer."""

import dataclasses
import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, get_type_hints

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, EnumNode, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mbgd import averaging
from mbgd.batches.loader import Data
from mbgd.batches.plan import Plan, count_steps, make_plan
from mbgd.building.make import make
from mbgd.building.observers import make_observers
from mbgd.building.optimizer import make_optimizer
from mbgd.building.references import referred
from mbgd.checkpoints import saving
from mbgd.config import Config, Run, in_steps, validate
from mbgd.config.duration import FORMS, problem
from mbgd.config.field_types import WORDS, converted
from mbgd.config.renamed import new_name
from mbgd.errors import UsageError
from mbgd.measuring import profiling
from mbgd.task import threads
from mbgd.task.objective import is_coupled
from mbgd.task.task import Task
from mbgd.text.suggestions import did_you_mean
from mbgd.trainer import Trainer
from mbgd.workers.group import Workers

FROM_DATA = ("input_shape", "num_outputs")
"""Arguments of a model that come from the training dataset if they are null in the configuration."""


def typed(composed: DictConfig) -> Config:
    """The configuration as typed settings; one UsageError names all its mistakes."""
    composed = composed.copy()
    found = []
    for key in _missing_keys(OmegaConf.to_container(composed)):
        found.append(f"{key} has no value. Give it one: {key}=…")
        OmegaConf.update(composed, key, None)  # so that references to it resolve, and other mistakes show, too
    schema = OmegaConf.structured(Config)
    _make_writable(schema)  # frozen classes make read-only sections, which cannot be merged into
    values = schema.copy()
    for path, value in _typed_values(_resolved(composed), schema):
        part = value
        for key in reversed(path):
            part = {key: part}
        try:
            values.merge_with(part)  # in place: `OmegaConf.merge` copies all of the configuration for each of its keys
        except OmegaConfBaseException as error:
            reason = str(error.msg or error).splitlines()[0].rstrip(".").replace("bf16_true", "bf16-true")
            name = _shown(path)
            meant = new_name(name) or did_you_mean(*_mistyped(name, reason, value, schema))
            found.append(
                f"{name}: {reason}.{_rule(reason)}{meant} `mbgd train --cfg job` shows every key and its value."
            )
    config = OmegaConf.to_object(values)
    assert isinstance(config, Config)
    found += validate(config)
    for name in ("data", "model", "objective", "optimizer"):
        if not isinstance(getattr(config, name), dict):
            found.append(f"{name}={getattr(config, name)}; it must be a group's choice, or name a _target_.")
    if isinstance(config.data, dict):
        found += _data_problems(config.data, OmegaConf.to_container(composed))
    if found:
        raise UsageError("the configuration has mistakes:\n" + "\n".join(f"  - {problem}" for problem in found))
    return config


def _resolved(composed: DictConfig) -> Any:
    """The configuration as plain values, with every reference resolved."""
    try:
        return OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        named = re.search(r"Interpolation key '([^']+)' not found", reason)
        meant = did_you_mean(named[1], _keys(composed)) if named else ""
        problem = "refers to a key that does not exist" if named else "cannot be resolved"
        raise UsageError(f"{error.full_key} {problem}: {reason.rstrip('.')}.{meant}") from error


def _mistyped(path: str, reason: str, value: Any, schema: DictConfig) -> tuple[str, list[str]]:
    """The refused key or value, and the valid ones if there is a choice."""
    if choices := re.search(r"expected one of \[(.*)\]", reason):
        return str(value), choices[1].split(", ")
    return path, list(_keys(schema)) if reason.startswith("Key ") else []


def _keys(schema: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, node in schema.items_ex(resolve=False):
        yield _shown([f"{prefix}{key!s}"])
        if isinstance(node, DictConfig):
            yield from _keys(node, f"{prefix}{key!s}.")


def _shown(path: Sequence[str]) -> str:
    """A key as users write it: `from` is a keyword in Python, so the field is `from_`."""
    return ".".join(path).removesuffix("_")


def _rule(reason: str) -> str:
    """The rule behind OmegaConf's `reason`, for reasons in its own terms."""
    if "Union[int, str]" in reason and "None" not in reason.split(" is incompatible")[0]:
        return f" It takes {FORMS}."
    kinds = {"Integer": int, "Float": float, "Boolean": bool}
    if found := re.search(r"could not be converted to (\w+)", reason):
        return f" It takes {WORDS[kinds[found[1]]].lower()}." if found[1] in kinds else ""
    if re.search(r"'False', expected one of \[.*\boff\b", reason):
        return ' YAML reads off as false: write "off", with quotes.'
    if "is not a subclass of" in reason:
        return " It is a section: give values to its keys."
    if "is not a ListConfig" in reason:
        return " It takes a list, such as [a,b]."
    return " It cannot be null." if "is not Optional" in reason or "Value 'None'" in reason else ""


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


def _typed_values(values: Any, schema: DictConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of each typed value; a node that the schema leaves open is one value."""
    for key, value in values.items():
        key = f"{key}_" if keyword.iskeyword(str(key)) else key
        section = schema.get(key) if key in schema else None
        if key == "resume" and isinstance(value, str):
            value = {"from": value}  # resume=never is short for resume.from=never
        if (
            isinstance(section, DictConfig)
            and dataclasses.is_dataclass(OmegaConf.get_type(section))
            and isinstance(value, dict)
        ):
            yield from _typed_values(value, section, (*path, str(key)))
        else:
            node = schema._get_node(key) if key in schema else None
            if isinstance(node, EnumNode):  # OmegaConf takes a member's name, and users give its value
                value = next((one.name for one in node.enum_type if one.value == value), value)
            yield (*path, str(key)), value


def _data_problems(data: dict[str, Any], unresolved: Any) -> list[str]:
    """Keys of `data` that nothing reads, and invalid values."""
    types = get_type_hints(Data)
    found = []
    if data.get("train") is None:
        found.append("data.train has no dataset; there is nothing to train on. Only data.evaluation may be null.")
    for key in data.keys() & types.keys():
        try:
            converted(f"data.{key}={data[key]}", data[key], types[key])
        except UsageError as error:
            found.append(str(error))
    unknown = set(data) - set(types)
    for key in sorted(unknown - referred(unresolved, "data", unknown)):
        valid = [f"data.{one}" for one in {**types, **data} if one != key] + list(_keys(OmegaConf.structured(Config)))
        found.append(
            f"data.{key}: there is no such key, and nothing refers to it as ${{data.{key}}}."
            f"{did_you_mean(f'data.{key}', valid)} Beside keys that the configuration refers to, data has "
            f"{', '.join(types)}; a dataset's own arguments stand under data.train and data.evaluation."
        )
    return found


def resolved_yaml(composed: DictConfig) -> str:
    """The whole configuration as text, with every reference resolved."""
    return OmegaConf.to_yaml(composed, resolve=True)


def run_name(run: Run, choices: Mapping[str, Any]) -> str:
    """run.name; without it the chosen experiment, or else the chosen model and data."""
    experiment = choices.get("experiment")
    chosen = [experiment] if experiment not in (None, "null") else [choices.get("model"), choices.get("data")]
    return run.name or "-".join(str(one).replace("/", "-") for one in chosen)


class SeededData:
    """The datasets, and the state of torch's generator after building them: models are initialised from there."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(config.seed)
        self.data, self.generator_state = build_data(config), torch.get_rng_state()


def build_trainer(config: Config, workers: Workers, seeded: SeededData | None = None) -> Trainer:
    """The trainer that the configuration describes, on this worker. seeded: built from it before; None: not yet."""
    averaging.fix_threads(config.averaging, workers.device)
    seeded = seeded or SeededData(config)
    data = seeded.data
    torch.manual_seed(config.seed)
    torch.set_rng_state(seeded.generator_state)
    from_data = {key: getattr(data.train, key, None) for key in FROM_DATA if config.model.get(key, ...) is None}
    model = make("model", config.model, **from_data)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; it must be a torch.nn.Module.")
    objective = make("objective", _with_teacher(config.objective, data), _partial_=_is_function(config.objective))
    if not callable(objective) and not is_coupled(objective):
        raise UsageError(
            f"objective is a {type(objective).__name__}; it must be a function (model, batch), or an object with the "
            "methods encode and losses."
        )
    optimizer, notes = make_optimizer(config.optimizer, Task(model, objective), config.batch.size)
    plan = make_plan(config, len(data.train), workers.num_workers)
    schedule = None
    if config.schedule is not None:
        schedule = make("schedule", _in_steps(config.schedule, plan), num_steps=count_steps(config, plan))
        if not callable(schedule):
            raise UsageError(f"schedule is a {type(schedule).__name__}; it must be a function of the step.")
    metrics = {name: make(f"evaluation.metrics.{name}", node) for name, node in config.evaluation.metrics.items()}
    evaluation = dataclasses.replace(config.evaluation, metrics=metrics)
    observers = make_observers(config)
    settings = dataclasses.replace(config, schedule=schedule, evaluation=evaluation)
    with threads.work_counted(model) as work:
        trainer = Trainer(model, objective, optimizer, data, settings, workers, observers)
    trainer.setup.warnings.extend(notes)
    threads.choose(config.averaging, workers.device, plan, work)
    saving.check(config.checkpoint, trainer.evaluations.names)
    profiling.check(config.profile, trainer.setup.num_steps)
    return trainer


def _in_steps(schedule: Any, plan: Plan) -> Any:
    """The node of a schedule with its arguments `…_steps` in whole steps, also where they are given in other units."""
    if not isinstance(schedule, dict):
        return schedule
    texts = {key: one for key, one in schedule.items() if str(key).endswith("_steps") and isinstance(one, str)}
    if found := [malformed for key, text in texts.items() if (malformed := problem(f"schedule.{key}", text))]:
        raise UsageError("\n".join(found))
    return schedule | {key: in_steps(text, plan) for key, text in texts.items()}


def build_data(config: Config) -> Data:
    """The datasets, and how they are read."""
    data = {key: config.data[key] for key in get_type_hints(Data) if key in config.data}
    for key, value in data.items():
        if key == "evaluation" and isinstance(value, dict) and "_target_" not in value:
            data[key] = {name: make(f"data.evaluation.{name}", node) for name, node in value.items()}
        elif key == "collate" and value is not None:
            data[key] = make("data.collate", value, _partial_=_is_function(value))
        elif key == "order" and isinstance(value, dict):
            data[key] = make("data.order", {name: _function_or_node(one) for name, one in value.items()})
        elif isinstance(value, dict) or (key in ("train", "evaluation") and value is not None):
            data[key] = make(f"data.{key}", value)
    return Data(**data)


def _with_teacher(node: Any, data: Data) -> Any:
    """The objective's node; a teacher's arguments that come from the dataset are filled in, as the model's."""
    teacher = node.get("teacher") if isinstance(node, dict) else None
    if not isinstance(teacher, dict):
        return node
    given = {key: getattr(data.train, key, None) for key in FROM_DATA if teacher.get(key, ...) is None}
    return {**node, "teacher": {**teacher, **given}}


def _function_or_node(node: Any) -> Any:
    """The node; where its target is a function, it becomes that function, not its result."""
    return {"_partial_": True, **node} if _is_function(node) else node


def _is_function(node: Any) -> bool:
    """Whether the target is itself an objective, not a class or factory that makes one."""
    try:
        return isinstance(node, dict) and isinstance(get_object(node["_target_"]), FunctionType)
    except Exception:  # `make` reports what is wrong with the target
        return False
