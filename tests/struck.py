"""`python tests/struck.py …` is `mbgd train …` whose workers are struck in the middle of what they do.

The environment variable STRIKES lists what befalls whom, as JSON: [seat, phase, how often the phase comes before that,
counted from 1, the signal; 0: an exception; negative: it only comes as many seconds late]. Seats are the ranks of the
first workers; those that come later have higher ones. STRUCK_SLOW: the seconds that each forward takes at least, so
that others have the time to come.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mbgd.averaging import pieces

STRIKES, OVER_GLOO, SLOW = "STRIKES", "STRUCK_OVER_GLOO", "STRUCK_SLOW"
HALF_UPDATED = "half updated"
"""A phase: the worker's pieces are half updated, here by something that is no number."""


class Small(nn.Module):
    """Has randomness, buffers that move, and parameters of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Linear(24, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        time.sleep(float(os.environ.get(SLOW, "0")) if self.training else 0)
        hidden: Tensor = self.last(self.dropout(torch.relu(self.norm(self.first(inputs.flatten(1))))))
        return hidden


def places() -> dict[str, tuple[Any, str]]:
    """By phase: what is called in it, as owner and name."""
    from torch import distributed
    from torch.optim import AdamW

    from mbgd import trainer
    from mbgd.after_step import AfterStep
    from mbgd.averaging.host_memory.parameters import SharedParameters
    from mbgd.averaging.reproducible import Reproducible
    from mbgd.averaging.sent_parameters import SentParameters
    from mbgd.checkpoints import format as checkpoint
    from mbgd.checkpoints.together import TakenTogether
    from mbgd.cli import run
    from mbgd.evaluation.evaluator import Evaluations
    from mbgd.runs.run_folder import RunFolder
    from mbgd.step.histograms import Histograms
    from mbgd.step.kept_pieces import KeptPieces
    from mbgd.step.observers import Observers
    from mbgd.step.sums import Sums
    from mbgd.step.train_step import TrainStep
    from mbgd.task.task import Task
    from mbgd.tracking.recent import Recent
    from mbgd.workers.membership import Membership
    from mbgd.workers.preemption import StopOnSignal
    from mbgd.workers.process_group import ProcessGroup

    return {
        "forward": (Task, "forward"),
        "averaging": (Reproducible, "finish"),
        "sums": (Sums, "exchange"),
        "optimizer": (AdamW, "step"),
        HALF_UPDATED: (AdamW, "step"),
        "keeping": (KeptPieces, "keep"),
        "spreading": (SentParameters if OVER_GLOO in os.environ else SharedParameters, "spread"),
        "observers": (Observers, "after_update"),
        "logging": (Recent, "log"),
        "checking": (trainer.Trainer, "check"),
        "evaluating": (Evaluations, "__call__"),
        "asking": (Observers, "stop"),
        "saving": (checkpoint, "save_file"),
        "taking": (TakenTogether, "_meet"),
        "drawing": (Histograms, "after_update"),
        "agreeing": (StopOnSignal, "agreed"),
        "stopping": (AfterStep, "_save_and_stop"),
        "ending": (trainer, "save_last"),
        "results": (RunFolder, "write_results"),
        "parting": (TrainStep, "end"),
        "meeting": (Membership, "meet"),
        "leaving": (ProcessGroup, "leave"),
        # The first time is before training, where a lost worker ends the run.
        "forming": (distributed, "init_process_group"),
        "building": (run, "build_trainer"),
        "handing over": (run, "hand_over"),
    }


def arm(phase: str, count: int, number: float) -> None:
    owner, name = places()[phase]
    function, calls = getattr(owner, name), 0

    def struck(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not number:
            raise ArithmeticError("struck")
        if calls == count and number < 0:
            print(f"late in {phase}", flush=True)
            time.sleep(-number)
        elif calls == count:
            if phase == HALF_UPDATED:
                spoil(arguments[0])
            os.kill(os.getpid(), int(number))
        return function(*arguments, **keywords)

    setattr(owner, name, struck)


def spoil(optimizer: torch.optim.Optimizer) -> None:
    """Leave what the optimizer holds as no update does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for tensor in (parameter.detach(), *optimizer.state[parameter].values()):
                tensor.fill_(float("nan"))


def arm_all() -> None:
    from mbgd.workers.membership import SEAT

    seat = int(os.environ.get(SEAT, os.environ["RANK"]))
    for of_seat, phase, count, number in json.loads(os.environ[STRIKES]):
        if of_seat == seat:
            arm(phase, count, number)
    if OVER_GLOO in os.environ:
        from mbgd import averaging
        from mbgd.averaging.host_memory.memory import CannotShareError

        def no_memory(workers: Any) -> None:
            raise CannotShareError("this run has none")

        averaging.HostMemory = no_memory  # type: ignore[attr-defined, assignment]


def main(train: Callable[[Sequence[str]], int]) -> None:
    pieces.BLOCK = 256  # so that workers own parts of parameters
    if "RANK" in os.environ:
        arm_all()
    sys.exit(train(sys.argv[1:]))


if __name__ == "__main__":
    from mbgd.cli.train import train

    main(train)
