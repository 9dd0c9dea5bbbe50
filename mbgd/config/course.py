"""What the course of training depends on, of a configuration as plain values."""

import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

SAME_COURSE = ("seed", "precision", "max_grad_norm", "model", "objective", "optimizer", "schedule")
"""Keys of the configuration that must not change when a run goes on, beside parts of `batch` and `data`."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the course of training depends on, of a whole configuration as plain values, by key.

    Not in it: the number of workers, the cut into micro-batches, averaging, backend, logging, evaluation. How long
    training lasts is in it only where the learning rate depends on it.
    """
    data = {key: value for key, value in config["data"].items() if key not in ("evaluation", "num_workers")}
    course = {key: config.get(key) for key in SAME_COURSE}
    course |= {"data": data, "batch": {key: config["batch"].get(key) for key in ("size", "drop_last")}}
    if _depends_on_length(config.get("schedule")):
        course |= {key: config[key] for key in ("epochs", "steps")}
    return dict(_flat(course))


def _depends_on_length(schedule: Any) -> bool:
    """Whether the learning rate at a step may change with the number of steps of the whole run.

    A class says so itself (`mbgd.schedule.Schedule`); one that it inherits from cannot know what it does.
    """
    if schedule is None:
        return False
    try:
        target = pkgutil.resolve_name(schedule["_target_"])
    except Exception:  # an older run's schedule need not be there any more
        return True
    return not isinstance(target, type) or vars(target).get("depends_on_length") is not False


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
