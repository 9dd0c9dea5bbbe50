"""`metrics.jsonl`: one JSON object for each logged step and each evaluation."""

import json
from pathlib import Path

from mbgd.tracking.base import Ending, Metrics


class JsonLines:
    """Appends {"step": …, "train/loss": …} lines to a file, each written at once, so that a crash loses none."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        if metrics:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self, ending: Ending) -> None:
        self._file.close()
