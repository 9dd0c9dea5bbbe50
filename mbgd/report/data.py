"""The data of the page: what its JavaScript draws, as plain values."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from typing import Any

from mbgd.report.curve import Curve
from mbgd.report.extras import extras
from mbgd.report.history import EPOCH, History
from mbgd.report.pictures import Picture, pictures, time_split
from mbgd.report.results import facts, results
from mbgd.report.tables import same_weights, tables
from mbgd.text.escaping import plain

MOST_POINTS = 40_000
"""Of all curves together: about 800 kB."""
MOST_POINTS_OF_CURVE, LEAST_POINTS_OF_CURVE = 2000, 24
MOST_POINTS_OF_AXIS, SHARE_OF_AXIS = 200, 8


def page_data(
    runs: Sequence[History],
    title: str,
    *,
    link: Callable[[History], str] = lambda run: "",
    problems: Sequence[str] = (),
    watched: bool = False,
) -> dict[str, Any]:
    """link(run): the address of the run's own page, or empty; problems: of folders that are not shown."""
    shown = pictures(runs)
    names = [name for picture in shown for name in picture.curves]
    kept, most = _budget(runs, names)
    notes = [*map(plain, problems), *same_weights(runs)]
    if len(kept) < len(names):
        notes.append(f"Of {len(runs):,} runs a page has room for these curves alone: {', '.join(map(plain, kept))}.")
    return {
        "title": plain(title),
        "watched": watched,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "notes": notes,
        "pictures": [_describe(picture, kept) for picture in shown if kept.keys() & picture.curves.keys()],
        "runs": [_describe_run(run, link(run), kept, most, len(runs)) for run in runs],
        "tables": tables(runs),
    }


def _budget(runs: Sequence[History], names: Sequence[str]) -> tuple[dict[str, None], int]:
    """(names of the curves that have room, points of each), the first pictures before the last."""
    kept: dict[str, None] = {}
    num = 0
    for name in names:
        num += sum(name in run.curves for run in runs)
        if kept and num * LEAST_POINTS_OF_CURVE > MOST_POINTS:
            break
        kept[name] = None
    num = max(1, sum(name in run.curves for run in runs for name in kept))
    return kept, max(LEAST_POINTS_OF_CURVE, min(MOST_POINTS_OF_CURVE, MOST_POINTS // num))


def _describe(picture: Picture, kept: Collection[str]) -> dict[str, Any]:
    curves = {plain(name): plain(label) for name, label in picture.curves.items() if name in kept}
    return {**asdict(picture), "title": plain(picture.title), "curves": curves}


def _describe_run(run: History, link: str, kept: Collection[str], most: int, num_runs: int) -> dict[str, Any]:
    per_epoch = run.numbers.get("examples_per_epoch")
    return {
        "name": run.name,
        "link": link,
        "outcome": run.outcome,
        "state": plain(run.state),
        "started": plain(run.record.get("environment", {}).get("started", "")),
        "problems": [plain(problem) for problem in run.problems],
        "results": [{**one, "name": plain(one["name"])} for one in results(run)],
        "facts": facts(run),
        "minibatch": run.numbers.get("minibatch_size"),
        "steps": run.numbers.get("steps"),
        "examples_per_epoch": per_epoch,
        "axes": {"epoch": _axis(run.curves.get(EPOCH), 1, most), "time": _axis(run.duration, per_epoch, most)},
        "curves": {plain(name): _points(run.curves[name], most) for name in run.curves if name in kept},
        "time": time_split(run),
        "extras": extras(run.folder, num_runs),
    }


def _axis(curve: Curve | None, factor: int | None, most: int) -> list[list[float]] | None:
    """[steps, values] between which the page interpolates; None if the folder does not tell."""
    if curve is None or not curve.num or factor is None:
        return None
    thinned = curve.thinned(min(MOST_POINTS_OF_AXIS, max(4, most // SHARE_OF_AXIS)))
    return [_numbers(thinned.steps), _numbers(thinned.values * factor)]


def _points(curve: Curve, most: int) -> dict[str, Any]:
    """x and y of the points; of a curve that is too long, also those of the buckets' means (mx, my)."""
    thinned = curve.thinned(most)
    found: dict[str, Any] = {"num": curve.num, "x": _numbers(thinned.steps), "y": _numbers(thinned.values)}
    if len(thinned.means):
        found |= {"mx": _numbers(thinned.mean_steps), "my": _numbers(thinned.means)}
    return found


def _numbers(values: Any) -> list[float]:
    """With the seven digits that float32 has; whole numbers as they are."""
    return [int(value) if value == math.floor(value) else float(f"{value:.7g}") for value in values.tolist()]
