"""`run.json`: the plan, environment, code and ending of a run; then the report made from its folder."""

import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mbgd import versions
from mbgd.files import strict_json
from mbgd.files.atomic import write_atomically
from mbgd.files.run_files import REPORT
from mbgd.runs.conditions import conditions
from mbgd.runs.wording import numbers, plan_lines
from mbgd.tracking.base import Ending, Metrics
from mbgd.tracking.code_version import code_version
from mbgd.trainer import Trainer


class Record:
    """Writes run.json at the start; at the end adds how the run ended."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self._folder = folder
        self._record: dict[str, Any] = {
            "plan": plan_lines(trainer),
            "numbers": numbers(trainer),
            "environment": {
                "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "host": platform.node(),
                "platform": platform.platform(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "mbgd": versions.of_mbgd(),
                "workers": trainer.setup.workers.num_workers,
                **conditions(trainer.setup),
            },
            "script": sys.argv[0],
            "code": code_version(sys.argv[0]),
            "first_step": trainer.state.step,
        }
        self._write()

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def close(self, ending: Ending) -> None:
        self._record["ending"] = {"outcome": ending.outcome.value, "message": ending.message}
        self._write()

    def _write(self) -> None:
        write_atomically(self._folder / "run.json", (strict_json.dumps(self._record, indent=2) + "\n").encode())


class Report:
    """Writes report.html at the end, after all that it is made from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def progress(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def close(self, ending: Ending) -> None:
        from mbgd.report import write_report

        write_report([self._folder], self._folder / REPORT)
