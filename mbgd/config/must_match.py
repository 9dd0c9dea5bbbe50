"""The settings that must be the same when a run is resumed: the fields marked MUST_MATCH, and the data."""

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from mbgd.config.field_types import Typed
from mbgd.config.settings import MUST_MATCH, Batch, Config

NOT_OF_TRAINING = ("evaluation", "num_workers")
"""Keys of `data` that may change when a run is resumed."""

AS_BEFORE = {"batch_norm": "micro_batch"}
"""Settings that older runs did not record, with the value that they all had."""


def must_match(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that must be the same when a run is resumed, by flat key; config: the whole of it, as plain values.

    `epochs` and `steps` are included only if the learning rate depends on them. The number of workers, the micro-batch
    size, averaging, backend, logging and evaluation may change.
    """
    values = {key: config.get(key, AS_BEFORE.get(key)) for key in marked(Config)}
    values["data"] = {key: value for key, value in config["data"].items() if key not in NOT_OF_TRAINING}
    values["batch"] = {key: config["batch"].get(key) for key in marked(Batch)}
    if _depends_on_length(config.get("schedule")):
        values |= {key: config[key] for key in ("epochs", "steps")}
    return dict(_flat(values))


def marked(section: type[Typed]) -> list[str]:
    """The fields of a section that are marked MUST_MATCH."""
    return [field.name for field in fields(section) if field.metadata == MUST_MATCH]  # type: ignore[arg-type]


def _depends_on_length(schedule: Any) -> bool:
    """Whether the learning rate at a step may depend on the number of steps of the whole run.

    A schedule's class declares it itself (`mbgd.schedule.Schedule`); a base class cannot know.
    """
    if schedule is None:
        return False
    try:
        target = pkgutil.resolve_name(schedule["_target_"])
    except Exception:  # an older run's schedule may no longer exist
        return True
    return not isinstance(target, type) or vars(target).get("depends_on_length") is not False


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
