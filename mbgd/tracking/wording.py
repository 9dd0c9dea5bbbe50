"""Metrics in words."""

import math
from collections.abc import Mapping

from mbgd.text.escaping import plain
from mbgd.tracking.base import Metrics

DETAILS = (
    "epoch",
    "parameter_norm",
    "update_ratio",
    "noise_scale",
    "gradient_variance",
    "num_workers",
    "skipped_steps",
    "examples_per_second",
)
"""Left out of a line to keep it short; metrics.jsonl and the report have them. The speed comes last in a line."""


def describe(metrics: Metrics, begin: str = "", width: float = math.inf) -> str:
    """Metrics in one line after `begin`, most important first; where that is wider than `width`, in several rows."""
    return _rows(begin, _cells(metrics), width)


class Lines:
    """Lines of a run's progress whose cells stand under each other."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._widths: dict[str, int] = {}
        """By metric: of the widest cell so far."""

    def line(self, step: int, metrics: Metrics, width: float = math.inf) -> str:
        """The step and its metrics, as `describe`."""
        begin = f"step {step}/{self._num_steps}".ljust(len(f"step {self._num_steps}/{self._num_steps}"))
        cells = _cells(metrics)
        for name, cell in cells.items():
            self._widths[name] = max(self._widths.get(name, 0), len(cell))
            cells[name] = cell.ljust(self._widths[name])
        return _rows(f"{begin} · ", cells, width)


def _rows(begin: str, cells: Mapping[str, str], width: float) -> str:
    """Cells in one row, or else the cells of each evaluation in rows of their own."""
    whole = begin + " · ".join(cells.values()).rstrip()
    if len(whole) <= width:
        return whole
    rows: list[str] = []
    of_row = ""
    for name, cell in cells.items():
        of_cell = name.rpartition("/")[0]
        if rows and of_cell == of_row and len(f"{rows[-1]} · {cell.rstrip()}") <= width:
            rows[-1] += f" · {cell}"
        else:
            rows.append((" " * len(begin) if rows else begin) + cell)
        of_row = of_cell
    return "\n".join(row.rstrip() for row in rows)


def _cells(metrics: Metrics) -> dict[str, str]:
    """By metric."""
    cells: dict[str, str] = {}
    for name, value in metrics.items():
        group, _, short = name.partition("/")
        if short in DETAILS or group == "time" or isinstance(value, str):
            continue
        is_first_of_evaluation = group == "eval" and not any(cell.startswith("eval") for cell in cells.values())
        cells[name] = f"{'eval ' if is_first_of_evaluation else ''}{plain(short.replace('_', ' '))} {value:.4g}"
    for unit in ("examples", "tokens"):
        for name, value in metrics.items():
            if name.endswith(f"/{unit}_per_second") and not isinstance(value, str):
                cells[name] = f"{value:,.0f} {unit}/s"
    return cells


def is_evaluation(metrics: Metrics) -> bool:
    return any(name.startswith("eval/") for name in metrics)
