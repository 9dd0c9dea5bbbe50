"""The trackers that the configuration asks for."""

import os
from importlib.util import find_spec
from pathlib import Path

from mbgd.config import Config, Tracking, WandbMode
from mbgd.errors import UsageError
from mbgd.files.run_files import REPORT
from mbgd.runs import wording
from mbgd.runs.record import Record, Report
from mbgd.runs.run_folder import RunFolder
from mbgd.tracking import console, wandb_sink
from mbgd.tracking.base import Tracker, Trackers
from mbgd.tracking.follower import Follower
from mbgd.tracking.json_lines import JsonLines
from mbgd.tracking.observed_lines import ObservedLines
from mbgd.trainer import Trainer

TENSORBOARD_SECONDS = 10.0


def check_installed(tracking: Tracking) -> None:
    """UsageError if a package that the configuration needs is not installed."""
    for package, is_wanted in (("wandb", _uses_wandb(tracking)), ("tensorboard", tracking.tensorboard)):
        if is_wanted and find_spec(package) is None:
            raise UsageError(
                f"tracking={package} needs the package {package}, which is not installed. "
                f"Use pip install 'mbgd[{package}]', or tracking=default."
            )


def open_trackers(trackers: Trackers, config: Config, folder: RunFolder, trainer: Trainer) -> None:
    """On the main worker: open the run's trackers and add them; the terminal's prints the plan first.

    A tracker that cannot be opened is left out, with a warning.
    """
    tracking, path = config.tracking, folder.path
    trackers.open("metrics.jsonl", lambda: JsonLines(folder.metrics_path))
    trackers.open("observed", lambda: ObservedLines(path))
    trackers.open("run.json", lambda: Record(path, trainer))
    if tracking.report:
        trackers.open(REPORT, lambda: Report(path))
    if not tracking.quiet:
        trackers.open("the terminal's progress", lambda: _terminal(trainer, path))
    if _uses_wandb(tracking):
        trackers.open("wandb", lambda: _wandb(config, path, trainer))
    if tracking.tensorboard:
        trackers.open(
            "tensorboard",
            lambda: Follower("tensorboard", path, finish_seconds=TENSORBOARD_SECONDS, quiet=tracking.quiet),
        )


def _terminal(trainer: Trainer, folder: Path) -> Tracker:
    print(f"{wording.describe_start(trainer)}\n{wording.describe_folder(folder)}", flush=True)
    return console.tracker(trainer.setup.num_steps, trainer.state.step)


def _wandb(config: Config, folder: Path, trainer: Trainer) -> Tracker:
    known = trainer.state.tracking.get("wandb") if config.resume.from_ == "auto" else None
    trainer.state.tracking["wandb"] = wandb_sink.remember_run_id(folder, known)
    tracking = config.tracking
    return Follower("wandb", folder, finish_seconds=tracking.wandb.finish_seconds, quiet=tracking.quiet)


def _uses_wandb(tracking: Tracking) -> bool:
    mode = tracking.wandb.mode
    by_environment = os.environ.get("WANDB_MODE") if mode is WandbMode.auto else None
    return (by_environment or mode.value) != WandbMode.disabled.value
