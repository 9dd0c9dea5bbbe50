"""The trackers that the configuration asks for."""

import json
import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from mbgd.conditions import conditions
from mbgd.config import Config, Tracking, WandbMode
from mbgd.errors import UsageError
from mbgd.run_folder import RunFolder, write_atomically
from mbgd.tracking import console, wandb_sink
from mbgd.tracking.base import Tracker, Trackers
from mbgd.tracking.code_version import code_version
from mbgd.tracking.follower import Follower
from mbgd.tracking.json_lines import JsonLines
from mbgd.trainer import Trainer

TENSORBOARD_SECONDS = 10.0


def check_installed(tracking: Tracking) -> None:
    """UsageError where a package that the configuration asks for is not installed."""
    for package, is_wanted in (("wandb", _uses_wandb(tracking)), ("tensorboard", tracking.tensorboard)):
        if is_wanted and find_spec(package) is None:
            raise UsageError(
                f"tracking={package} needs the package {package}, which is not installed. "
                f"Use pip install 'mbgd[{package}]', or tracking=default."
            )


def open_trackers(config: Config, folder: RunFolder, trainer: Trainer) -> Tracker:
    """On the main worker: say what the run is, on the terminal and in `start.json`, and open its trackers."""
    tracking = config.tracking
    _write_start(folder.path, trainer)
    trackers: list[Tracker] = [JsonLines(folder.metrics_path)]
    if not tracking.quiet:
        print(console.describe_start(trainer), flush=True)
        trackers.append(console.tracker(trainer.num_steps))
    if _uses_wandb(tracking):
        known = trainer.state.tracking.get("wandb") if config.resume == "auto" else None
        trainer.state.tracking["wandb"] = wandb_sink.remember_run_id(folder.path, known)
        trackers.append(Follower("wandb", folder.path, finish_seconds=tracking.wandb.finish_seconds))
    if tracking.tensorboard:
        trackers.append(Follower("tensorboard", folder.path, finish_seconds=TENSORBOARD_SECONDS))
    return Trackers(trackers)


def _uses_wandb(tracking: Tracking) -> bool:
    mode = tracking.wandb.mode
    by_environment = os.environ.get("WANDB_MODE") if mode is WandbMode.auto else None
    return (by_environment or mode.value) != WandbMode.disabled.value


def _write_start(folder: Path, trainer: Trainer) -> None:
    plan, workers = trainer.plan, trainer.workers
    start = {
        "plan": console.plan_lines(trainer),
        "environment": {
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "host": platform.node(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "workers": workers.num_workers,
            **conditions(plan, workers.device),
        },
        "script": sys.argv[0],
        "code": code_version(sys.argv[0]),
        "first_step": trainer.state.step,
    }
    write_atomically(folder / "start.json", (json.dumps(start, indent=2) + "\n").encode())
