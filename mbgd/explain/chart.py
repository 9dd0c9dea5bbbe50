"""The variance of the mean gradient over the minibatch's size, both logarithmic, as SVG."""

import math

from mbgd.explain.variance import Variance
from mbgd.report.axes import Axis, grid
from mbgd.text.numbers import short

WIDTH, HEIGHT = 620, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 44


def draw(variance: Variance) -> str:
    """Dots for what was measured, the line 1/k, and marks at the noise scale."""
    points = [(point.size, point.variance) for point in variance.points if point.variance > 0]
    if not points:
        return '<p class="say">All examples have the same gradient: there is no noise to show.</p>'
    low_k, high_k = points[0][0], max(points[-1][0], 2)
    lines = [variance.of_one / k for k in (low_k, high_k)]
    values = [value for _, value in points] + lines
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))

    x = Axis(low_k, high_k, LEFT, WIDTH - RIGHT, is_log=True)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, is_log=True)
    parts = [grid(x, y, {k: str(k) for k, _ in points}, {value: short(value) for value in y.ticks(6)})]
    parts.append(
        f'<text class="x" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}">examples in a minibatch, k</text>'
    )
    ends = " L".join(f"{x(k):.1f},{y(value):.1f}" for k, value in zip((low_k, high_k), lines, strict=True))
    parts.append(f'<path class="line" d="M{ends}"/>')
    parts.append(_mark(variance, x, y))
    parts += [f'<circle class="point" cx="{x(k):.1f}" cy="{y(value):.1f}" r="4.5"/>' for k, value in points]
    return (
        '<figure><figcaption>Variance of the mean gradient <span class="hint">both axes logarithmic</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="variance over k">{"".join(parts)}</svg></figure>'
    )


def _mark(variance: Variance, x: Axis, y: Axis) -> str:
    """Where the line meets the squared norm of the gradient, if that is in the picture."""
    scale, level = variance.noise_scale, variance.gradient_squared
    parts = []
    if y.low <= level <= y.high:
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(
            f'<text class="y" x="{WIDTH - RIGHT - 4}" y="{y(level) - 6:.1f}">squared norm of the gradient itself</text>'
        )
    if x.low <= scale <= x.high:
        parts.append(f'<line class="mark" x1="{x(scale):.1f}" x2="{x(scale):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        is_left = x(scale) < (LEFT + WIDTH) / 2
        anchor, offset = ("start", 6) if is_left else ("y", -6)
        place = f'x="{x(scale) + offset:.1f}" y="{HEIGHT - BOTTOM - 8}"'
        parts.append(f'<text class="{anchor}" {place}>noise scale {short(scale)}</text>')
    return "".join(parts)
