"""The files of what observers write: see mbgd/files/observed.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mbgd.files import strict_json
from mbgd.files.lines import MOST_LINE_BYTES
from mbgd.files.reading import open_regular
from mbgd.files.run_files import OBSERVED
from mbgd.tracking.base import Ending, Metrics


class ObservedLines:
    """Appends lines to a file for each observer, each written at once, so that a crash loses none."""

    def __init__(self, folder: Path) -> None:
        """folder: the run's."""
        self._folder = folder / OBSERVED
        self._files: dict[str, BinaryIO] = {}

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def observed(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        content = (strict_json.dumps({"step": step, **values}) + "\n").encode()
        if len(content) > MOST_LINE_BYTES:
            raise ValueError(
                f"the observer {name} writes a line of {len(content):,} bytes; at most {MOST_LINE_BYTES:,}"
            )
        if name not in self._files:
            self._folder.mkdir(exist_ok=True)
            self._files[name] = open_regular(self._folder / f"{name}.jsonl", "ab")
        self._files[name].write(content)
        self._files[name].flush()

    def close(self, ending: Ending) -> None:
        for file in self._files.values():
            file.close()
