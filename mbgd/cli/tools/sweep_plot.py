"""The picture of a sweep: the metric against each swept key, and what it took to reach the target; as SVG."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbgd.config import Direction
from mbgd.files.atomic import write_atomically
from mbgd.report.axes import CHARACTER, CHART_STYLE, NUM_COLOURS, Axis, grid
from mbgd.runs.sweeps import Job, Ranking
from mbgd.text.escaping import in_html as escape
from mbgd.text.escaping import plain
from mbgd.text.numbers import short

WIDTH, HEIGHT = 520, 290
"""Of one panel, without its title and legend."""
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 14, 52
HEAD = 34
"""Height of the whole picture's title."""
TITLE_HEIGHT, ROW_HEIGHT = 34, 19
SYMBOL = 26
"""Width of a legend's line or mark."""

MOST_CURVES = NUM_COLOURS
"""With more combinations of the other keys than this, points are drawn instead of curves."""
MOST_LABELS = 8
"""With more values of a numeric key than this, round numbers are labelled instead of the values."""
FAR_OFF = 100.0
"""A value that is more than this many times the median would squeeze all others into a line: it is marked instead."""

MARK, STROKE = (SYMBOL - 7) / 2, f"M0,0H{SYMBOL - 7}"
CROSS = "M-4-4L4,4M-4,4L4-4"
STYLE = """svg { font-family: system-ui, sans-serif; }
svg .title { fill: var(--ink); font-weight: 600; font-size: 13px; }
svg .head { font-size: 15px; }
svg .cross { stroke: var(--bad); stroke-width: 1.8; fill: none; }
svg .ideal { stroke: var(--soft); }
"""

Measure = Callable[[Job], float | None]
Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class _Panel:
    title: str
    legend: list[list[str]]
    """SVG of the entries in each of its rows."""
    plot: str

    @property
    def head_height(self) -> int:
        return TITLE_HEIGHT + ROW_HEIGHT * len(self.legend)

    def draw(self, left: int, top: int, head_height: int) -> str:
        """head_height: of the tallest head beside this one."""
        rows = "".join(
            f'<g transform="translate({LEFT},{TITLE_HEIGHT + ROW_HEIGHT * number + 6})">{"".join(entries)}</g>'
            for number, entries in enumerate(self.legend)
        )
        return (
            f'<g transform="translate({left},{top})"><text class="title" x="{LEFT}" y="24">{escape(self.title)}</text>'
            f'{rows}<g transform="translate(0,{head_height})">{self.plot}</g></g>'
        )


def plot(ranking: Ranking, path: Path) -> None:
    """Write the picture."""
    panels = [_panel(ranking, key, ranking.metric, ranking.value) for key in ranking.keys]
    if "batch.size" in ranking.keys and ranking.target is not None:
        goal = f"{ranking.metric} of {ranking.target:g}"
        panels += [
            _panel(ranking, "batch.size", f"steps to {goal}", ranking.steps),
            _panel(ranking, "batch.size", f"examples to {goal}", ranking.examples),
        ]
    num_columns = min(len(panels), 3) if len(panels) != 4 else 2
    best = "lowest" if ranking.direction is Direction.minimize else "highest"
    title = f"{path.resolve().parent.name} · {_count(ranking)} · {ranking.metric}, {best} is best"
    title = _cut(title, num_columns * WIDTH - LEFT - RIGHT)
    parts, top = [f'<text class="title head" x="{LEFT}" y="{HEAD - 6}">{escape(title)}</text>'], HEAD
    for first in range(0, len(panels), num_columns):
        row = panels[first : first + num_columns]
        head_height = max(panel.head_height for panel in row)
        parts += [panel.draw(column * WIDTH, top, head_height) for column, panel in enumerate(row)]
        top += head_height + HEIGHT
    size = f'width="{num_columns * WIDTH}" height="{top}"'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {num_columns * WIDTH} {top}">\n'
        f'<style>\n{CHART_STYLE}{STYLE}</style>\n<rect {size} fill="var(--card)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
    write_atomically(path, svg.encode())


def _count(ranking: Ranking) -> str:
    """For example: 12 jobs, 2 without a value."""
    num_jobs = len(ranking.jobs)
    num_without = sum(not math.isfinite(ranking.value(job)) for job in ranking.jobs)
    without = f", {num_without} without a value" if num_without else ""
    return f"{num_jobs} job{'' if num_jobs == 1 else 's'}{without}"


def _panel(ranking: Ranking, key: str, label: str, measure: Measure) -> _Panel:
    jobs = sorted((job for job in ranking.jobs if key in job.record.swept), key=lambda job: job.record.number)
    places = _Places([job.record.swept[key] for job in jobs])
    is_count = measure != ranking.value
    curves, off = _curves(ranking, key, measure, [(places.of(job.record.swept[key]), job) for job in jobs])
    points = [point for curve in curves.values() for point in curve]
    y = _y_axis([value for _, value in points], is_count=is_count)
    y_labels = {value: short(value) for value in y.ticks(5)} if points else {}
    x = places.axis(max(LEFT, CHARACTER * max(map(len, y_labels.values()), default=0) + 14), WIDTH - RIGHT)
    middle = (x.first_pixel + x.last_pixel) / 2
    key_label = f'<text class="x" x="{middle:.1f}" y="{HEIGHT - 12}">{escape(_cut(key, WIDTH - LEFT))}</text>'
    drawn, entries = _draw_curves(curves, x, y, label, are_joined=not places.named)
    if measure == ranking.steps and points and not places.named:
        drawn += _ideal(points, x, y)
        entries.append(_entry(f'<path class="curve dashed ideal" d="{STROKE}"/>', "steps ∝ 1/batch.size"))
    if off:
        drawn += "".join(f'<path class="cross" transform="translate({x(one):.1f},{TOP})" d="{CROSS}"/>' for one in off)
        cross = f'<path class="cross" transform="translate({MARK},0)" d="{CROSS}"/>'
        entries.append(_entry(cross, "failed, or not reached" if is_count else "failed, or far off"))
    title = _cut(f"{label} (log)" if y.is_log else label, 0.9 * (WIDTH - LEFT))
    return _Panel(title, _rows(entries), grid(x, y, places.labels(x), y_labels) + key_label + drawn)


def _curves(
    ranking: Ranking, key: str, measure: Measure, jobs: Sequence[tuple[float, Job]]
) -> tuple[Curves, list[float]]:
    """(points by the values of the other keys, places of the jobs that have none); jobs: with their places."""
    values = [value for _, job in jobs if (value := measure(job)) is not None and math.isfinite(value)]
    usual = statistics.median(abs(value) for value in values) if values and measure == ranking.value else 0.0
    highest = FAR_OFF * usual or math.inf
    curves: Curves = {}
    off = []
    for x, job in jobs:
        y = measure(job)
        others = " ".join(f"{k}={v}" for k, v in job.record.swept.items() if k in ranking.keys and k != key)
        curve = curves.setdefault(others, [])  # also without points, so that colours are the same in each panel
        if y is None or not abs(y) <= highest or math.isinf(y):
            off.append(x)
        else:
            curve.append((x, y))
    return curves, off


def _draw_curves(
    curves: Curves, x: Axis, y: Axis, label: str, *, are_joined: bool
) -> tuple[str, list[tuple[str, float]]]:
    """(SVG of the lines and points, entries of the legend)."""
    is_one_colour = len(curves) > MOST_CURVES
    parts, entries = [], []
    for number, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        colour = f"var(--c{0 if is_one_colour else number})"
        line = f'<path class="curve" stroke="{colour}" d="%s"/>' if are_joined and not is_one_colour else ""
        if line:
            parts.append(line % _path(sorted(points), x, y))
        for place, value in points:
            told = escape(f"{name} {label} {short(value)}".strip())
            circle = f'cx="{x(place):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}" opacity=".9"'
            parts.append(f"<circle {circle}><title>{told}</title></circle>")
        if name and not is_one_colour:
            entries.append(_entry(f'{line.replace("%s", STROKE)}<circle cx="{MARK}" r="3.5" fill="{colour}"/>', name))
    return "".join(parts), entries


def _y_axis(values: Sequence[float], *, is_count: bool) -> Axis:
    """Logarithmic where values differ by factors."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and (is_count or high >= 10 * low):
        factor = (high / low) ** 0.06 if high > low else 1.5
        return Axis(low / factor, high * factor, HEIGHT - BOTTOM, TOP, is_log=True)
    space = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - space, high + space, HEIGHT - BOTTOM, TOP)


def _ideal(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Half the steps for twice the minibatch, from the best job of the smallest, as far as the picture goes."""
    smallest, largest = min(size for size, _ in points), max(size for size, _ in points)
    steps = min(steps for size, steps in points if size == smallest)
    sizes = [smallest * (largest / smallest) ** (number / 100) for number in range(101)]
    line = [(size, steps * smallest / size) for size in sizes if steps * smallest / size >= y.low]
    return f'<path class="curve dashed ideal" d="{_path(line, x, y)}"/>'


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x(one):.1f},{y(other):.1f}" for one, other in points)


def _entry(symbol: str, label: str) -> tuple[str, float]:
    """(SVG of a legend's entry at the place 0, its width)."""
    label = _cut(label, WIDTH - LEFT - RIGHT - SYMBOL)
    return f'{symbol}<text x="{SYMBOL}" y="4">{escape(label)}</text>', SYMBOL + CHARACTER * len(label) + 14


def _rows(entries: Sequence[tuple[str, float]]) -> list[list[str]]:
    """As many entries in a row as there is room for."""
    rows: list[list[str]] = []
    place = math.inf
    for entry, width in entries:
        if place + width > WIDTH - LEFT:
            rows.append([])
            place = 0.0
        rows[-1].append(f'<g transform="translate({place:.1f},0)">{entry}</g>')
        place += width
    return rows


def _cut(text: str, pixels: float) -> str:
    """The text, or its beginning where there is no room for all of it."""
    text, room = plain(text), max(1, int(pixels / CHARACTER))
    return text if len(text) <= room else text[: room - 1] + "…"


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

    def axis(self, left: float, right: float) -> Axis:
        if self.named:
            return Axis(-0.5, len(self._texts) - 0.5, left, right)
        low, high = self._numbers[0], self._numbers[-1]
        if is_geometric(self._numbers):
            factor = (high / low) ** 0.05
            return Axis(low / factor, high * factor, left, right, is_log=True)
        space = 0.05 * (high - low) or abs(high) / 2 or 1.0
        return Axis(low - space, high + space, left, right)

    def labels(self, axis: Axis) -> Mapping[float, str]:
        if self.named:
            room = (axis.last_pixel - axis.first_pixel) / len(self._texts) - CHARACTER
            return {float(number): _cut(text, room) for number, text in enumerate(self._texts)}
        if len(self._numbers) > MOST_LABELS:
            return {value: short(value) for value in axis.ticks(5)}
        shown: dict[float, str] = {}
        end = -math.inf
        for number in self._numbers:
            half = CHARACTER * len(f"{number:g}") / 2
            if axis(number) - half >= end:  # otherwise it would cover the one before
                shown[number] = f"{number:g}"
                end = axis(number) + half + CHARACTER
        return shown


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
