"""The axes of charts: values to pixels, round values to label, and the grid."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mbgd.text.escaping import in_html as escape

CHARACTER = 7.0
"""Width of one character of a label, in pixels."""

CHART_STYLE = Path(__file__).with_name("chart.css").read_text()
"""Colours and lines of every chart, for the page or picture around it."""
NUM_COLOURS = 8
"""--c0 to --c7."""


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    first_pixel: float
    last_pixel: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._scale(each) for each in (self.low, self.high, value))
        return self.first_pixel + (value - low) / (high - low) * (self.last_pixel - self.first_pixel)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self, number: int) -> list[float]:
        """About this number of round values."""
        if self.is_log:
            exponents = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high) + 1e-9) + 1)
            powers = self._within([10.0**power for power in exponents])
            between = self._within([factor * 10.0**power for power in exponents for factor in (1, 2, 5)])
            if len(between) > 1.5 * number:
                return powers[:: max(1, len(powers) // number)]
            if len(between) > 1:
                return between
        rough = (self.high - self.low) / number
        magnitude = 10.0 ** math.floor(math.log10(rough))
        distance = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
        first, last = math.ceil(self.low / distance - 1e-9), math.floor(self.high / distance + 1e-9)
        return [number * distance for number in range(first, last + 1)]

    def _within(self, values: list[float]) -> list[float]:
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def grid(x: Axis, y: Axis, x_labels: Mapping[float, str], y_labels: Mapping[float, str]) -> str:
    """A line for each labelled value of y, and the labels of both; SVG."""
    left, right, bottom = x.first_pixel, x.last_pixel, y.first_pixel
    parts = []
    for value, label in y_labels.items():
        height = y(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="y" x="{left - 7:.1f}" y="{height + 4:.1f}">{escape(label)}</text>')
    for value, label in x_labels.items():
        parts.append(f'<text class="x" x="{x(value):.1f}" y="{bottom + 18:.1f}">{escape(label)}</text>')
    return "".join(parts)
