"""A run's recorded configuration, with overrides, for tools that compute with a finished or running run again."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from mbgd.batches.loader import Data
from mbgd.building import command_line, configuration
from mbgd.building.build import typed
from mbgd.building.composing import CONFIGURATION, compose, from_values
from mbgd.config import (
    Check,
    Checkpoint,
    Config,
    EarlyStoppingSettings,
    EmaSettings,
    HistogramSettings,
    Init,
    NoiseScale,
    PredictionSettings,
    Unfreeze,
)
from mbgd.errors import UsageError
from mbgd.files.reading import Unreadable
from mbgd.files.run_files import read_config
from mbgd.text.escaping import plain

READ = ("averaging", "backend", "data", "evaluation", "model", "objective", "precision", "seed")
"""The sections and keys that an evaluation reads."""

NODES = ("data.train", "data.evaluation", "data.collate")

OF_DATA = re.compile(r"\$\{[^}]*\bdata\.")
"""A reference to a key of `data`."""


def recorded_values(folder: Path) -> dict[str, Any]:
    """The values of a run's config.yaml; UsageError if the folder is not a run's."""
    try:
        return read_config(folder)
    except (FileNotFoundError, Unreadable) as error:
        raise UsageError(
            f"{plain(folder)} is not the folder of a run: config.yaml cannot be read ({plain(error)}). A run's folder "
            "is what train.py names at the start."
        ) from error


def recorded(folder: Path, overrides: Sequence[str]) -> Config:
    """The configuration with which the run's weights are evaluated; UsageError for a mistake in an override.

    overrides: Hydra's. A group's choice, such as data=tensors, replaces the whole recorded group. What concerns only
    training (schedule, checkpoints, observers, profile) is left out.
    """
    values = recorded_values(folder)
    configuration.use_folder(Path.cwd())
    config = typed(_overridden(values, overrides) if overrides else from_values(values))
    return replace(
        config,
        epochs=None,
        steps=0,
        batch=replace(config.batch, drop_last=False),
        schedule=None,
        checkpoint=Checkpoint(),
        check=Check(),
        noise_scale=NoiseScale(every_steps=None),
        init=Init(),
        ema=EmaSettings(),
        early_stopping=EarlyStoppingSettings(),
        freeze=[],
        unfreeze=Unfreeze(),
        histograms=HistogramSettings(),
        predictions=PredictionSettings(),
        observers={},
        profile=None,
    )


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> Any:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        hint = command_line.hint(error, CONFIGURATION)
        raise UsageError(hint or command_line.brief(error)) from error
    keys = [one.key_or_group for one in parsed]
    groups = {key for key in keys if _is_group(key)}
    for override, key in zip(overrides, keys, strict=True):
        _check(override, key, groups)
    composed = compose([one for one, key in zip(overrides, keys, strict=True) if _section(key) in groups])
    others = [one for one in parsed if _section(one.key_or_group) not in groups]
    if "data" in groups:
        _check_references(composed, values, {*keys, *groups})
    OmegaConf.set_struct(composed, False)
    for key, node in from_values(values).items():
        if key not in groups:
            composed[key] = node
    for one in others:
        if one.key_or_group in NODES:
            OmegaConf.update(composed, one.key_or_group, None)  # a new node is not merged into the old one
    OmegaConf.set_struct(composed, True)
    try:
        ConfigLoaderImpl._apply_overrides_to_config(others, composed)
    except (HydraException, OmegaConfBaseException) as error:
        hint = command_line.hint(error, CONFIGURATION)
        raise UsageError("\n".join(filter(None, (command_line.brief(error), hint)))) from error
    return composed


def _section(key: str) -> str:
    return re.split(r"[./]", key)[0]


def _is_group(key: str) -> bool:
    return any((folder / key).is_dir() for folder in (configuration.OURS, *configuration.own))


def _check(override: str, key: str, groups: set[str]) -> None:
    """UsageError for an override that would have no effect."""
    if _section(key) not in READ:
        raise UsageError(
            f"{override}: an evaluation does not read {_section(key)}; it reads {', '.join(READ)}. Leave it out."
        )
    name = key.split(".")[1] if key.startswith("data.") else ""
    if name and "data" not in groups and name not in get_type_hints(Data):
        raise UsageError(
            f"{override}: a run records what data.{name} led to, not which keys refer to it. Choose the data again, "
            f"data=NAME {override}, or change a dataset's own argument, such as data.evaluation.{name}=…"
        )


def _check_references(composed: Any, values: dict[str, Any], given: set[str]) -> None:
    """UsageError if the new data's own value of a key differs from the run's, and the command does not decide."""
    from omegaconf import OmegaConf

    for path in _references(OmegaConf.to_container(composed)):
        section, *keys = path.split(".")
        if section == "data" or section in given or path in given or section not in READ:
            continue
        before: Any = values.get(section)
        for key in keys:
            before = before.get(key, ...) if isinstance(before, dict) else ...
        now = OmegaConf.select(composed, path)
        if before is not ... and before != now:
            name = "null" if now is None else now
            raise UsageError(
                f"{path} is {'null' if before is None else before} in the run, and would be {name} with this data. "
                f"Say which counts: {path}={name}, or the run's value."
            )


def _references(node: Any, prefix: str = "") -> Iterator[str]:
    """The paths of values that refer to a key of `data`."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _references(value, f"{prefix}{key}.")
    elif isinstance(node, str) and OF_DATA.search(node):
        yield prefix.removesuffix(".")
