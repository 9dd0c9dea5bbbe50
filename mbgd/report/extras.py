"""What the panels below the charts show: the name of each in the page's data, and its reader of a run's folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mbgd.report.observed import histograms, predictions

MOST_BYTES = 400_000
"""Of all panels of all runs of a page, as JSON."""

READERS: dict[str, Callable[[Path, int], Any]] = {"histograms": histograms, "predictions": predictions}
"""A reader gets a run's folder and the most bytes; it returns plain values, or None where the folder has none."""


def extras(folder: Path, num_runs: int) -> dict[str, Any]:
    """The panels' data of one of `num_runs` runs."""
    most = MOST_BYTES // num_runs // len(READERS)
    found = {name: read(folder, most) for name, read in READERS.items()}
    return {name: data for name, data in found.items() if data is not None}
