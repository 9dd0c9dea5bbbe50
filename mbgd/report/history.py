"""What a run's folder tells: curves by name, and what the run was."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mbgd.errors import UsageError

Curve = list[tuple[int, float]]
"""(step, value) in the order of steps."""


@dataclass(frozen=True)
class History:
    name: str
    curves: dict[str, Curve]
    """By the names of metrics.jsonl. Values that are not finite are left out."""
    summary: dict[str, Any]
    """Empty where the run is not complete."""
    record: dict[str, Any]
    """run.json: plan, environment, code, and how the run ended."""
    config: dict[str, Any]
    """By dotted keys."""

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
    """Raises UsageError where the folder is not a run's; what else is missing is left empty."""
    return History(
        name=folder.resolve().name,
        curves=_read_curves(folder / "metrics.jsonl"),
        summary=_read(folder / "summary.json", json.loads),
        record=_read(folder / "run.json", json.loads),
        config=_flat(_read(folder / "config.yaml", yaml.safe_load)),
    )


def _read_curves(path: Path) -> dict[str, Curve]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"{path.parent} is not the folder of a run: {path.name} cannot be read ({error.strerror}). A run's folder "
            "is what train.py names at the end."
        ) from error
    curves: dict[str, Curve] = {}
    for line in lines:
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, AttributeError):
            continue  # cut off by a crash
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((step, value))
    return curves


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
