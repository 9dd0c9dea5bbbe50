"""What train.py does with a configuration, in this process and on one worker."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import mbgd
from mbgd.building.build import build_trainer, typed
from mbgd.checkpoints import saving
from mbgd.config import must_match
from mbgd.runs.resume import resume
from mbgd.runs.run_folder import open_run_folder
from mbgd.runs.trackers import open_trackers
from mbgd.tracking import Trackers, told_of_its_end

CONF = Path(__file__).parent.parent / "conf"


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def agreed(self, step: int) -> bool:
        return step == self.step


def run(
    folder: Path, *overrides: str, stop_at: int | None = None, after_step: Callable[[int], None] | None = None
) -> float:
    """Two short epochs on the digits; the seconds that training took, without its end."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", ["epochs=2", "log_every_steps=5", f"run.dir={folder}", *overrides])
    config, plain = typed(composed), yaml.safe_load(OmegaConf.to_yaml(composed, resolve=True))
    workers = mbgd.Workers()
    trainer = build_trainer(config, workers)
    opened = open_run_folder(config.run, "", workers, may_hold_a_run=True)
    assert resume(trainer, opened, config, plain)
    opened.write_config(yaml.safe_dump(plain))
    tracker = Trackers()
    open_trackers(tracker, config, opened, trainer)
    checkpoints = saving.create(config.checkpoint, opened.path, opened.checkpoints_path, must_match(plain), workers)
    if after_step is not None:
        tracker.progress = after_step  # type: ignore[method-assign, assignment]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun; more would wait for each other on a busy machine
    with told_of_its_end(tracker):
        start = time.monotonic()
        result = trainer.fit(tracker, checkpoints, None if stop_at is None else StopAt(stop_at))
        seconds = time.monotonic() - start
        opened.write_results(result, trainer)
    torch.set_num_threads(num_threads)
    return seconds


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
