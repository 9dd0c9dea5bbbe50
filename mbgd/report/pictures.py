"""Which curves belong in one picture, and in what order people look at them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mbgd.report.history import History

FIRST = ("loss", "accuracy")
OPTIMIZATION = ("learning_rate", "gradient_norm", "noise_scale", "gradient_variance", "parameter_norm", "update_ratio")
LEFT_OUT = ("epoch",)
BORING_UNLESS_THEY_CHANGE = ("num_workers", "skipped_steps", "peak_memory_bytes", "slowest_worker_rank")
LINEAR = ("accuracy", "learning_rate", "examples_per_second", "tokens_per_second", "load")
TOGETHER: Mapping[str, tuple[str, str]] = {
    "cpu_load": ("load", "processors"),
    "gpu_load": ("load", "GPU"),
    "host_memory_bytes": ("memory_in_use_bytes", "host"),
    "gpu_memory_bytes": ("memory_in_use_bytes", "GPU"),
}
"""Metrics of one picture: its name, and the curve's label in it."""
WHOLES = ("step", "total", "elapsed", "epoch")
"""Words in the names of times that are not a part of a step."""
UNITS = ("bytes", "seconds")


@dataclass(frozen=True)
class Picture:
    title: str
    group: str
    unit: str
    """bytes, seconds, share (0 to 1), or empty."""
    curves: dict[str, str]
    """Label by name: the same metric in training and evaluation."""
    may_be_log: bool
    shows_minibatch: bool
    """Whether the minibatch in use is drawn beside the curves, which are in examples."""


def pictures(runs: Sequence[History]) -> list[Picture]:
    """A picture for each metric, training and evaluation together, most important first."""
    parts_of_time = {name for run in runs for name in _parts_of_time(run)}
    groups: dict[str, list[str]] = {}
    names = dict.fromkeys(name for run in runs for name in run.curves)
    for name in names:
        short = _short(name, names)
        if short in LEFT_OUT or name in parts_of_time or (short in BORING_UNLESS_THEY_CHANGE and _is_flat(name, runs)):
            continue
        groups.setdefault(TOGETHER.get(short, (short, ""))[0], []).append(name)
    return [_picture(short, groups[short]) for short in sorted(groups, key=lambda short: _rank(short, groups[short]))]


def _picture(short: str, names: Sequence[str]) -> Picture:
    is_noise_scale = short == "noise_scale"
    return Picture(
        title=_title(short),
        group=("metrics", "metrics", "optimization", "metrics", "speed and machine")[_rank(short, names)[0]],
        unit="share" if short == "load" else next((unit for unit in UNITS if short.endswith(f"_{unit}")), ""),
        curves={name: "noise scale" if is_noise_scale else _label(name, short) for name in sorted(names, reverse=True)},
        may_be_log=short not in LINEAR,
        shows_minibatch=is_noise_scale,
    )


def _label(name: str, short: str) -> str:
    """train, eval, or eval and the name of the evaluation set; for curves put together, what tells them apart."""
    group, _, rest = name.partition("/")
    return TOGETHER[rest][1] if rest in TOGETHER else f"{group} {rest.removesuffix(short).strip('/')}".strip()


def _short(name: str, names: Collection[str]) -> str:
    """The metric's name without train/ or eval/, and without the name of an evaluation set."""
    group, _, rest = name.partition("/")
    _, _, last = rest.partition("/")
    is_of_a_set = group == "eval" and f"train/{last}" in names
    return last if is_of_a_set else rest or name


def time_split(run: History) -> dict[str, float]:
    """The mean seconds of each part of a step, by name."""
    return {_title(name.removeprefix("time/")): run.curves[name].mean for name in _parts_of_time(run)}


def _parts_of_time(run: History) -> list[str]:
    times = [name for name in run.curves if name.startswith("time/") and name.endswith("_seconds")]
    return [name for name in times if not any(word in name for word in WHOLES)]


def _is_flat(name: str, runs: Sequence[History]) -> bool:
    found = [run.curves[name] for run in runs if name in run.curves]
    return len({value for curve in found for value in (curve.least.value, curve.greatest.value)}) == 1


def _rank(short: str, names: Sequence[str]) -> tuple[int, int]:
    if short in FIRST:
        return 0, FIRST.index(short)
    if any(name.startswith("eval/") for name in names):
        return 1, 0
    if short in OPTIMIZATION:
        return 2, OPTIMIZATION.index(short)
    return 4 if all(name.startswith("time/") for name in names) else 3, 0


def _title(short: str) -> str:
    return short.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
