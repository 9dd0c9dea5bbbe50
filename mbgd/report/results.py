"""What a run came to: the last value of each metric beside its best."""

from typing import Any

from mbgd.config import Direction
from mbgd.report.history import History

LOWER = ("loss", "error", "perplexity", "nll", "mse", "mae", "rmse", "bits")
HIGHER = ("accuracy", "auroc", "auc", "f1", "precision", "recall", "bleu", "rouge", "iou", "dice", "r2", "top")
"""Words of metrics' names that tell which values are better."""


def results(run: History) -> list[dict[str, Any]]:
    """Each evaluation's metric, or the training loss where there is none: name, last, best and its step.

    best is None where neither the configuration nor the name tells which values are better.
    """
    names = [name for name in run.curves if name.startswith("eval/")] or [n for n in ("train/loss",) if n in run.curves]
    found = []
    for name in names:
        curve, direction = run.curves[name], direction_of(name, run.config)
        best = {Direction.minimize: curve.least, Direction.maximize: curve.greatest}.get(direction)  # type: ignore[arg-type]
        found.append(
            {
                "name": name.replace("/", " ").replace("_", " "),
                "last": curve.last.value,
                "best": best and best.value,
                "best_step": best and best.step,
            }
        )
    return found


def direction_of(name: str, config: dict[str, Any]) -> Direction | None:
    """Whether lower or higher values of a metric are better: by the configuration, or by a word of its name."""
    for section, key in (("checkpoint", "best"), ("early_stopping", "metric"), ("sweep", "metric")):
        given = config.get(f"{section}.direction")
        if config.get(f"{section}.{key}") == name and given in list(Direction.__members__):
            return Direction(given)
    words = name.lower().replace("/", "_").split("_")
    for direction, known in ((Direction.minimize, LOWER), (Direction.maximize, HIGHER)):
        if any(word in known for word in words):
            return direction
    return None


def facts(run: History) -> list[tuple[str, float, str]]:
    """(name, number, unit) of what a run took."""
    workers = run.record.get("environment", {}).get("workers", run.summary.get("num_workers"))
    speed = run.summary.get("examples_per_second", run.last("time/examples_per_second"))
    found = [
        ("steps", run.last_step, ""),
        ("training time", seconds(run), "duration"),
        ("examples/s", speed, ""),
        ("peak memory", run.last("time/peak_memory_bytes"), "bytes"),
        ("workers", workers, ""),
    ]
    return [(name, value, unit) for name, value, unit in found if isinstance(value, int | float)]


def seconds(run: History) -> float | None:
    """Of training, without evaluations; None if the folder does not tell."""
    per_epoch = run.numbers.get("examples_per_epoch")
    return run.duration.last.value * per_epoch if per_epoch and run.duration.num else None
