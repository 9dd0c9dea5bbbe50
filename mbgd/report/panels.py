"""Which curves belong in one picture, and in what order people look at them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mbgd.report.history import History

FIRST = ("loss", "accuracy")
THEN = ("learning_rate", "gradient_norm", "noise_scale", "gradient_variance", "parameter_norm", "update_ratio")
LEFT_OUT = ("epoch",)
BORING_UNLESS_THEY_CHANGE = ("num_workers", "skipped_steps", "peak_memory_bytes")
LINEAR = ("accuracy", "learning_rate", "examples_per_second", "tokens_per_second")
WHOLES = ("step", "total", "elapsed", "epoch")
"""Words in the names of times that are not a part of a step."""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    names: tuple[str, ...]
    """Of the curves: the same metric in training and evaluation."""
    may_be_log: bool


def panels(runs: Sequence[History]) -> list[Panel]:
    """A picture for each metric, training and evaluation together, most important first."""
    parts_of_time = {name for run in runs for name in _parts_of_time(run)}
    groups: dict[str, list[str]] = {}
    names = dict.fromkeys(name for run in runs for name in run.curves)
    for name in names:
        short = _short(name, names)
        if short in LEFT_OUT or name in parts_of_time or (short in BORING_UNLESS_THEY_CHANGE and _is_flat(name, runs)):
            continue
        groups.setdefault(short, []).append(name)
    return [
        Panel(_title(short), _unit(short), tuple(sorted(groups[short], reverse=True)), short not in LINEAR)
        for short in sorted(groups, key=lambda short: _rank(short, groups[short]))
    ]


def _short(name: str, names: Collection[str]) -> str:
    """The metric's name without train/ or eval/, and without the name of an evaluation set."""
    group, _, rest = name.partition("/")
    _, _, last = rest.partition("/")
    is_of_a_set = group == "eval" and f"train/{last}" in names
    return last if is_of_a_set else rest or name


def time_split(run: History) -> dict[str, float]:
    """The mean seconds of each part of a step, by name."""
    return {
        _title(name.removeprefix("time/").removesuffix("_seconds")): sum(value for _, value in curve) / len(curve)
        for name, curve in ((name, run.curves[name]) for name in _parts_of_time(run))
    }


def _parts_of_time(run: History) -> list[str]:
    times = [name for name in run.curves if name.startswith("time/") and name.endswith("_seconds")]
    return [name for name in times if not any(word in name for word in WHOLES)]


def _is_flat(name: str, runs: Sequence[History]) -> bool:
    return len({value for run in runs for _, value in run.curves.get(name, ())}) == 1


def _rank(short: str, names: Sequence[str]) -> tuple[int, int]:
    if short in FIRST:
        return 0, FIRST.index(short)
    if any(name.startswith("eval/") for name in names):
        return 1, 0
    if short in THEN:
        return 2, THEN.index(short)
    return 4 if all(name.startswith("time/") for name in names) else 3, 0


def _title(short: str) -> str:
    return short.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _unit(short: str) -> str:
    return next((unit for unit in ("bytes", "seconds") if short.endswith(f"_{unit}")), "")
