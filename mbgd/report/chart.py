"""Line charts as SVG, by hand: matplotlib takes a second to import, longer than it takes to draw all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mbgd.report.axes import CHARACTER, Axis, grid
from mbgd.report.history import Curve
from mbgd.text.escaping import in_html as escape
from mbgd.text.numbers import short, size_of_unit, whole

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 26
MOST_POINTS = 600
"""Of one curve; beyond, only the least and the greatest value of each stretch are drawn."""
LOG_FROM = 30.0
"""Ratio of the greatest to the least value from which the axis is logarithmic."""


@dataclass(frozen=True)
class Series:
    label: str
    colour: int
    dashed: bool
    points: Curve


def draw(
    title: str, series: Sequence[Series], *, unit: str = "", may_be_log: bool = True
) -> tuple[str, dict[str, Any]]:
    """(SVG, what the page needs to show values under the pointer)."""
    series = [Series(one.label, one.colour, one.dashed, thinned(one.points)) for one in series]
    steps = [step for one in series for step, _ in one.points]
    values = [value for one in series for _, value in one.points]
    y = _y_axis(values, unit, may_be_log=may_be_log)
    labels = {value: short(value, unit) for value in y.ticks(5)}
    x = _x_axis(steps, max(LEFT, CHARACTER * max((len(label) for label in labels.values()), default=0) + 8))
    parts = [grid(x, y, {step: whole(step) for step in x.ticks(5) if step == int(step)}, labels)]
    for one in series:
        path = "M" + "L".join(f"{x(step):.1f},{y(value):.1f}" for step, value in one.points)
        style = f'class="curve{" dashed" if one.dashed else ""}" stroke="var(--c{one.colour})"'
        parts.append(f'<path d="{path}" {style}/>')
        if len(one.points) <= 40:
            parts += [
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5" fill="var(--c{one.colour})"/>'
                for step, value in one.points
            ]
    parts.append(f'<line class="pointer" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    log = ' <span class="hint">log</span>' if y.is_log else ""
    svg = (
        f'<figure><figcaption>{escape(title)}{log}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
    data = {
        "x": [x.low, x.high, x.first_pixel, x.last_pixel],
        "width": WIDTH,
        "series": [
            {"label": one.label, "colour": one.colour, "points": [(s, short(v, unit)) for s, v in one.points]}
            for one in series
        ],
    }
    return svg, data


def thinned(points: Curve) -> Curve:
    """The least and the greatest value of each of so many stretches that the picture stays the same."""
    if len(points) <= MOST_POINTS:
        return points
    num_stretches = MOST_POINTS // 2
    kept: Curve = []
    for number in range(num_stretches):
        stretch = points[number * len(points) // num_stretches : (number + 1) * len(points) // num_stretches]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def _x_axis(steps: Sequence[int], left: float) -> Axis:
    low, high = min(steps), max(steps)
    return Axis(low, high if high > low else low + 1, left, WIDTH - RIGHT)


def _y_axis(values: Sequence[float], unit: str, *, may_be_log: bool) -> Axis:
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        return Axis(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, is_log=True)
    space = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom = low - space
    round_in = size_of_unit(high) if unit == "bytes" else 1.0
    return Axis(0.0 if low >= 0 > bottom else bottom, high + space, HEIGHT - BOTTOM, TOP, unit=round_in)
