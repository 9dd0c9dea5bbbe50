"""The trackers that the configuration asks for."""

import os
from importlib.util import find_spec

from mbgd.config import Config, Tracking, WandbMode
from mbgd.errors import UsageError
from mbgd.run_folder import RunFolder
from mbgd.tracking import console, wandb_sink, wording
from mbgd.tracking.base import Tracker, Trackers
from mbgd.tracking.follower import Follower
from mbgd.tracking.json_lines import JsonLines
from mbgd.tracking.record import Record
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
    """On the main worker: open the run's trackers; the terminal's begins with what the run is."""
    tracking = config.tracking
    trackers: list[Tracker] = [
        JsonLines(folder.metrics_path),
        Record(folder.path, trainer, report=tracking.report),
    ]
    if not tracking.quiet:
        print(wording.describe_start(trainer), flush=True)
        trackers.append(console.tracker(trainer.num_steps, trainer.state.step))
    if _uses_wandb(tracking):
        known = trainer.state.tracking.get("wandb") if config.resume == "auto" else None
        trainer.state.tracking["wandb"] = wandb_sink.remember_run_id(folder.path, known)
        seconds = tracking.wandb.finish_seconds
        trackers.append(Follower("wandb", folder.path, finish_seconds=seconds, quiet=tracking.quiet))
    if tracking.tensorboard:
        trackers.append(Follower("tensorboard", folder.path, finish_seconds=TENSORBOARD_SECONDS, quiet=tracking.quiet))
    return Trackers(trackers)


def _uses_wandb(tracking: Tracking) -> bool:
    mode = tracking.wandb.mode
    by_environment = os.environ.get("WANDB_MODE") if mode is WandbMode.auto else None
    return (by_environment or mode.value) != WandbMode.disabled.value
