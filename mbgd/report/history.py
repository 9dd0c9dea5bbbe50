"""What a run's folder tells: curves by name, and what the run was."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mbgd.files import run_files
from mbgd.files.run_files import read_config, read_run, read_summary
from mbgd.text.escaping import plain
from mbgd.tracking.json_lines import Line, describe_bad
from mbgd.tracking.json_lines import read_history as read_metrics

Curve = list[tuple[int, float]]
"""(step, value) in the order of steps."""

MOST, LEAST = 1e150, 1e-150
"""Beyond, a picture's own arithmetic would overflow."""


@dataclass(frozen=True)
class History:
    name: str
    curves: dict[str, Curve]
    """By the names of metrics.jsonl. Values that are not finite, or beyond ±1e150, are left out."""
    summary: dict[str, Any]
    """Empty where the run is not complete."""
    record: dict[str, Any]
    """run.json: plan, environment, code, and how the run ended."""
    config: dict[str, Any]
    """By dotted keys."""
    problems: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def state(self) -> str:
        """How the run ended, in words."""
        ending = self.record.get("ending")
        if ending is None:
            return "finished" if self.summary else "running, or ended without a word"
        return f"{ending['outcome']}: {ending['message']}" if ending["message"] else str(ending["outcome"])

    @property
    def last_step(self) -> int:
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    def last(self, name: str) -> float | None:
        return self.curves[name][-1][1] if name in self.curves else None


def read_history(folder: Path) -> History:
    """Raises UsageError where the folder is not a run's; what else is missing, or cannot be read, is left empty."""
    lines, bad = read_metrics(folder)
    problems = [f"metrics.jsonl: {describe_bad(bad)}"] if bad else []

    read = partial(run_files.read_or_tell, folder=folder, problems=problems)
    return History(
        name=plain(folder.resolve().name),
        curves=_curves(lines),
        summary=read(read_summary),
        record=read(read_run),
        config=_flat(read(read_config)),
        problems=problems,
    )


def _curves(lines: list[Line]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.metrics.items():
            if not isinstance(value, str) and abs(value) <= MOST:  # not a number is not
                curves.setdefault(name, []).append((line.step, value if abs(value) >= LEAST else 0.0))
    return curves


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
