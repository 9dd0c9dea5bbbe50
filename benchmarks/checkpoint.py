"""How long a checkpoint blocks training, and how long restoring takes: `python benchmarks/checkpoint.py`.

The same state (parameters and momentum) is saved and restored by mbgd, by torch.save and torch.load, and by
torch.distributed.checkpoint's async_save and load, in interleaved rounds in one process and on one file system.
"Stall" is the time for which the training thread is blocked; "save" is the time until everything is written (mbgd: also
flushed to the disk and hashed); "restore" is from the files to the parameters and the optimizer's state (mbgd: with
every hash verified). "read" is the time to read the same files into fresh memory, for comparison.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import mbgd
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.saving import CheckpointFolder
from mbgd.config import Checkpoint

from machine import publish

SIZES = {"25 MB": 1768, "1 GB": 11180}
"""Width w of a linear layer of w × w parameters, which with their momentum are so large."""

Times = dict[str, float]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def make_trainer(width: int) -> mbgd.Trainer:
    model = nn.Linear(width, width, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = mbgd.Data(train=mbgd.InMemory(torch.randn(8, width), torch.randn(8, width)))
    trainer = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, mbgd.Settings(steps=1))
    trainer.fit()
    return trainer


def with_mbgd(trainer: mbgd.Trainer, folder: Path, checkpoints: CheckpointFolder, step: int) -> Times:
    trainer.state.step = step
    stall = timed(lambda: checkpoints.after_step(step, {}, trainer.snapshot))
    save = stall + timed(checkpoints._wait)
    newest = folder / checkpoint.name_of(step)
    read = timed(lambda: [path.read_bytes() for path in newest.iterdir()])

    def restore() -> None:
        path = checkpoint.newest(folder)
        assert path is not None
        trainer.restore(checkpoint.read(path)[0])

    return {"stall": stall, "save": save, "restore": timed(restore), "read": read}


def with_torch_save(trainer: mbgd.Trainer, folder: Path) -> Times:
    path = folder / "state.pt"
    model, optimizer = trainer.setup.model, trainer.setup.optimizer

    def restore() -> None:
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    save = timed(lambda: torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path))
    return {"stall": save, "save": save, "restore": timed(restore)}


def with_dcp(trainer: mbgd.Trainer, folder: Path) -> Times:
    shutil.rmtree(folder / "dcp", ignore_errors=True)
    model, optimizer = trainer.setup.model, trainer.setup.optimizer
    futures = []

    def start() -> None:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer}
        futures.append(dcp.async_save(state, checkpoint_id=folder / "dcp"))

    def restore() -> None:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=folder / "dcp")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    stall = timed(start)
    save = stall + timed(lambda: futures[0].result())
    return {"stall": stall, "save": save, "restore": timed(restore)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's folder for temporary files")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        store = dist.FileStore(f"{name}/store", 1)  # async_save wants a process group
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        lines = [f"{'state':<8}{'':<42}{'stall':>10}{'save':>10}{'stall/save':>12}{'restore':>10}{'restore/read':>14}"]
        for size in arguments.sizes:
            lines += compare(size, arguments.rounds, Path(name))
        dist.destroy_process_group()
    publish(
        "checkpoint", "Medians of interleaved rounds; the first round, with fresh memory, apart.\n\n" + "\n".join(lines)
    )


def compare(size: str, num_rounds: int, folder: Path) -> list[str]:
    trainer = make_trainer(SIZES[size])
    checkpoints = CheckpointFolder(folder / size, Checkpoint(every_steps=1, every_seconds=None, keep=1), {})
    rows: dict[str, list[Times]] = {"mbgd": [], "torch.save, torch.load": [], "distributed.checkpoint async_save": []}
    for step in range(1, num_rounds + 2):
        for name, times in zip(
            rows,
            (
                with_mbgd(trainer, folder / size, checkpoints, step),
                with_torch_save(trainer, folder),
                with_dcp(trainer, folder),
            ),
            strict=True,
        ):
            rows[name].append(times)
    lines = []
    for name, rounds in rows.items():
        for label, chosen in ((f"{name}, first", rounds[:1]), (name, rounds[1:])):
            read = statistics.median(times["read"] for times in rows["mbgd"][1:])
            stall, save, restore = (
                statistics.median(times[key] for times in chosen) for key in ("stall", "save", "restore")
            )
            lines.append(
                f"{size:<8}{label:<42}{stall:>8.3f} s{save:>8.3f} s{stall / save:>12.2f}{restore:>8.3f} s"
                f"{restore / read:>14.2f}"
            )
    return lines


if __name__ == "__main__":
    main()
