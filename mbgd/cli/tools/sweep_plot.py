"""The picture of a sweep: the metric against each swept key, and what it took to reach the target."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from mbgd.runs.sweeps import Job, Ranking
from mbgd.text.escaping import plain

COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222255"]
"""Paul Tol's bright scheme, which readers with any colour vision tell apart, and a dark blue."""

MOST_CURVES = len(COLOURS)
"""With more combinations of the other keys than this, points are drawn instead of curves."""

FAR_OFF = 100.0
"""A value that is so many times the median would squeeze all others into a line: it is marked instead."""

Measure = Callable[[Job], float | None]


def plot(ranking: Ranking, path: Path) -> None:
    """Write the picture as PNG."""
    panels: list[tuple[str, str, Measure]] = [(key, ranking.metric, ranking.value) for key in ranking.keys]
    if "batch.size" in ranking.keys and ranking.target is not None:
        goal = f"{ranking.metric} of {ranking.target:g}"
        panels += [
            ("batch.size", f"steps to {goal}", ranking.steps),
            ("batch.size", f"examples to {goal}", ranking.examples),
        ]
    columns = min(len(panels), 3) if len(panels) != 4 else 2
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (key, label, measure) in zip(grid, panels, strict=False):
        _panel(axes, ranking, key, label, measure)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, ranking: Ranking, key: str, label: str, measure: Measure) -> None:
    jobs = sorted((job for job in ranking.jobs if key in job.record.swept), key=lambda job: job.record.number)
    places = _Places([job.record.swept[key] for job in jobs])
    curves: dict[str, list[tuple[float, float]]] = {}
    off: list[float] = []
    values = [value for job in jobs if (value := measure(job)) is not None and math.isfinite(value)]
    is_count = measure != ranking.value
    usual = statistics.median(abs(value) for value in values) if values and not is_count else 0.0
    highest = FAR_OFF * usual or math.inf
    for job in jobs:
        x, y = places.of(job.record.swept[key]), measure(job)
        others = " ".join(f"{k}={v}" for k, v in job.record.swept.items() if k in ranking.keys and k != key)
        curve = curves.setdefault(others, [])  # also without points, so that colours are the same in each panel
        if y is None or not abs(y) <= highest or math.isinf(y):
            off.append(x)
        else:
            curve.append((x, y))
    is_curves = len(curves) <= MOST_CURVES
    for number, (name, points) in enumerate(curves.items()):
        if points:
            colour = COLOURS[number if is_curves else 0]
            style = "o-" if is_curves and not places.named else "o"
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, style, color=colour, label=_literally(name), markersize=5, alpha=0.9)
    _scale(axes, [y for points in curves.values() for _, y in points], is_count=is_count)
    places.label(axes)
    axes.set_xlabel(_literally(key))
    axes.set_ylabel(_literally(label))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [line for line in axes.get_lines() if line.get_label() and is_curves]
    if label.startswith("steps") and values:
        handles.append(_perfect_scaling(axes, curves))
    if off:
        # At the upper edge, whatever the scale.
        axes.plot(off, [1.0] * len(off), "x", color="red", transform=axes.get_xaxis_transform(), clip_on=False)
        why = "failed, or not reached" if is_count else "failed, or far off"
        handles.append(Line2D([], [], marker="x", color="red", linestyle="", label=why))
    if any(not str(handle.get_label()).startswith("_") for handle in handles):
        axes.legend(handles=handles, fontsize="small", framealpha=0.7, edgecolor="none")


def _scale(axes: Axes, values: Sequence[float], *, is_count: bool) -> None:
    """A logarithmic axis where values differ by factors, with plain numbers."""
    if not values or min(values) <= 0 or (max(values) < 10 * min(values) and not is_count):
        return
    axes.set_yscale("log")
    if max(values) < 1000 * min(values):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _perfect_scaling(axes: Axes, curves: dict[str, list[tuple[float, float]]]) -> Line2D:
    """Half the steps for twice the minibatch, from the best job of the smallest."""
    points = [point for curve in curves.values() for point in curve]
    sizes = [size for size, _ in points]
    smallest, largest = min(sizes), max(sizes)
    steps = min(steps for size, steps in points if size == smallest)
    limits = axes.get_ylim()
    line_steps = [steps, steps * smallest / largest]
    [line] = axes.plot([smallest, largest], line_steps, "--", color="grey", label="steps ∝ 1/batch.size")
    axes.set_ylim(limits)
    return line


def _literally(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return plain(text).replace("$", r"\$")


class _Places:
    """Where a key's values lie on the axis: numbers by value, anything else by name."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(dict.fromkeys(texts))
        numbers = [_number(text) for text in self._texts]
        self.named = any(number is None for number in numbers)
        self._numbers = sorted(number for number in numbers if number is not None)

    def of(self, text: str) -> float:
        number = _number(text)
        return float(self._texts.index(text)) if self.named or number is None else number

    def label(self, axes: Axes) -> None:
        if self.named:
            axes.set_xticks(range(len(self._texts)), [_literally(text) for text in self._texts])
            axes.margins(x=0.2)
            return
        if is_geometric(self._numbers):
            axes.set_xscale("log")
        if len(self._numbers) <= 8:
            axes.xaxis.set_major_locator(NullLocator())
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(self._numbers, [f"{number:g}" for number in self._numbers])
            axes.xaxis.set_minor_formatter(NullFormatter())


def is_geometric(values: Sequence[float]) -> bool:
    """Whether sorted values are spread by factors rather than by differences."""
    if len(values) < 2 or values[0] <= 0:
        return False
    if len(values) == 2:
        return values[1] >= 2 * values[0]

    def unevenness(places: Sequence[float]) -> float:
        gaps = [b - a for a, b in itertools.pairwise(places)]
        return max(gaps) / max(min(gaps), 1e-300)

    return values[-1] >= 4 * values[0] and unevenness([math.log(v) for v in values]) < unevenness(values)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
