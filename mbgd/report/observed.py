"""The panels' data that observers have written: histograms of the layers, predictions of a few evaluation examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from mbgd.files import observed, strict_json
from mbgd.files.observed import HistogramLine, PredictionLine
from mbgd.text.escaping import plain

MOST_STEPS = 8
T = TypeVar("T")


def histograms(folder: Path, most_bytes: int) -> dict[str, Any] | None:
    """lines: of at most MOST_STEPS steps, the first and the last among them; problem: what cannot be read."""
    lines, problem = observed.read(folder, observed.HISTOGRAMS, HistogramLine)
    if not lines and not problem:
        return None
    values = [_plain(observed.plain_values(line)) for line in lines]
    for most in range(MOST_STEPS, 0, -1):
        found = {"lines": _spread(values, most), "problem": plain(problem)}
        if _size(found) <= most_bytes:
            return found
    return {"lines": [], "problem": "the histograms have no room in this page"}


def predictions(folder: Path, most_bytes: int) -> dict[str, Any] | None:
    """sets: by evaluation set its steps, and its examples, each with what was predicted at each step."""
    lines, problem = observed.read(folder, observed.PREDICTIONS, PredictionLine)
    if not lines and not problem:
        return None
    sets: dict[str, list[PredictionLine]] = {}
    for line in lines:
        sets.setdefault(line.set, []).append(line)
    shown = {plain(name): _shown(_spread(of_set, MOST_STEPS)) for name, of_set in sets.items()}
    while _size(shown) > most_bytes and any(one["examples"] for one in shown.values()):
        for one in shown.values():
            one["examples"] = one["examples"][: len(one["examples"]) // 2]
    return {"sets": shown, "problem": plain(problem)}


def _shown(lines: Sequence[PredictionLine]) -> dict[str, Any]:
    """The examples of the last line, with their predictions in those lines that have the same examples."""
    last = lines[-1]
    same = [line for line in lines if len(line.examples) == len(last.examples)]
    examples = []
    for number, example in enumerate(last.examples):
        values = _plain(observed.plain_values(example))
        history = [_plain(observed.plain_values(line.examples[number])) for line in same]
        values["predicted"] = [one.get("predicted", []) for one in history]
        values["tokens"] = [one.get("tokens", []) for one in history]
        examples.append(values)
    return {"steps": [line.step for line in same], "examples": examples}


def _spread(lines: Sequence[T], most: int) -> list[T]:
    """At most this many, evenly spread; the last is kept, and the first where there is room for two."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(number * (len(lines) - 1) / max(1, most - 1))] for number in range(most - 1)] + [lines[-1]]


def _size(values: Any) -> int:
    return len(strict_json.dumps(values, is_compact=True))


def _plain(value: Any) -> Any:
    """The same with every text in one line, without control characters."""
    if isinstance(value, dict):
        return {plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return plain(value) if isinstance(value, str) else value
