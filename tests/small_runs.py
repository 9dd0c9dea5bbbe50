"""A run that takes some hundredths of a second, in this process, with everything that it leaves on the disk."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

import mbgd
from mbgd.checkpoints import saving
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.config import Checkpoint, Config, Evaluation, Run, Tracking, must_match
from mbgd.config.must_match import marked
from mbgd.errors import Preempted
from mbgd.runs.record import Record
from mbgd.runs.resume import resume
from mbgd.runs.run_folder import RunFolder, open_run_folder
from mbgd.tracking import told_of_its_end
from mbgd.tracking.base import Trackers
from mbgd.tracking.json_lines import JsonLines

NUM_STEPS = 8
PLAIN: dict[str, Any] = {
    **dict.fromkeys(marked(Config)),
    "seed": 0,
    "model": {"_target_": "torch.nn.Linear", "width": 3},
    "optimizer": {"lr": 0.1},
    "data": {"train": {"_target_": "own"}, "evaluation": {"_target_": "own"}},
    "batch": {"size": 4, "drop_last": False},
    "evaluation": {"metrics": {}},
    "epochs": None,
    "steps": NUM_STEPS,
    "checkpoint": {"best": "eval/loss", "direction": "minimize"},
}


class StopAt:
    def __init__(self, step: int) -> None:
        self._step = step

    def agreed(self, step: int) -> bool:
        return step == self._step


def prepare(folder: Path, **settings: Any) -> tuple[mbgd.Trainer, RunFolder, Config]:
    """What a start of the run in this folder begins with."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    inputs = torch.arange(30, dtype=torch.float32).view(10, 3) / 30
    trainer = mbgd.Trainer(
        model,
        mbgd.MeanSquaredError(),
        torch.optim.AdamW(model.parameters(), lr=0.1),
        mbgd.Data(
            train=mbgd.InMemory(inputs, inputs.sum(1, keepdim=True)),
            evaluation=mbgd.InMemory(inputs[:5], inputs[:5].sum(1, keepdim=True)),
        ),
        mbgd.Settings(steps=NUM_STEPS, batch=mbgd.Batch(4), log_every_steps=1, evaluation=Evaluation(3)),
    )
    keep = Checkpoint(every_steps=2, every_seconds=None)
    config = Config(steps=NUM_STEPS, checkpoint=keep, tracking=Tracking(quiet=True), **settings)
    return trainer, open_run_folder(Run(dir=str(folder)), "", trainer.setup.workers, may_hold_a_run=True), config


def train(folder: Path, *, stop_at: int | None = None, **settings: Any) -> str | None:
    """The run of this folder, up to its end or `stop_at`: the hash of its weights, None if it was complete already."""
    trainer, opened, config = prepare(folder, **settings)
    if not resume(trainer, opened, config, PLAIN):
        return None
    path = opened.checkpoints_path
    checkpoints = saving.create(config.checkpoint, opened.path, path, must_match(PLAIN), trainer.setup.workers)
    opened.write_config(yaml.safe_dump(PLAIN))
    tracker = Trackers([JsonLines(opened.metrics_path), Record(opened.path, trainer)])
    try:
        with told_of_its_end(tracker):
            result = trainer.fit(tracker, checkpoints, None if stop_at is None else StopAt(stop_at))
            opened.write_results(result, trainer)
    except Preempted:
        pass
    return weights_sha256(trainer.setup.model)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in found]
