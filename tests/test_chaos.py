"""Workers killed and stopped at every phase of a step and of a save: the run goes on and ends with the same bits.

`make test` plays a few seeded schedules, `make chaos` many: MBGD_CHAOS_RUNS says how many.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml

import mbgd
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import saving
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.config import Checkpoint, Config, Run, must_match
from mbgd.config.must_match import marked
from mbgd.data import digits
from mbgd.errors import Preempted, WorkersLost
from mbgd.runs.resume import resume
from mbgd.runs.run_folder import open_run_folder
from mbgd.tracking.json_lines import JsonLines
from mbgd.workers.group import start_workers
from mbgd.workers.preemption import StopOnSignal

from processes import environment, free_port

NUM_RUNS = int(os.environ.get("MBGD_CHAOS_RUNS", "8"))
NUM_STEPS = 40
TIMEOUT_SECONDS = 4.0
SECONDS_FOR_A_ROUND = 60.0

PHASES = ("forward", "averaging", "optimizer", "save", "rename")


@dataclass(frozen=True)
class Blow:
    """What happens to a round of workers: in the `count`-th `phase` of the victim, a signal."""

    victim: int
    """A rank; −1: all workers at once."""
    phase: str
    count: int
    signal: signal.Signals


@dataclass(frozen=True)
class Round:
    num_workers: int
    memory_every_steps: int | None
    blow: Blow | None


def schedule(seed: int) -> list[Round]:
    """Rounds of workers, each ended by a blow; the last one is left alone."""
    chance = random.Random(seed)
    rounds = []
    # Every phase has its turn as the seeds go by, whatever else chance says.
    for number in range(chance.randint(1, 3)):
        num_workers = chance.randint(1, 4)
        phase = PHASES[(seed + number) % len(PHASES)]
        in_save = phase in ("save", "rename")
        signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
        if num_workers > 1 and not in_save:
            signals.append(signal.SIGSTOP)
        blow = Blow(
            victim=0 if in_save else chance.choice([-1, *range(num_workers)]),  # the main worker saves
            phase=phase,
            count=chance.randint(1, 4 if in_save else 20),
            signal=chance.choice(signals),
        )
        rounds.append(Round(num_workers, chance.choice([None, 1, 3]), blow))
    return [*rounds, Round(chance.randint(1, 4), None, None)]


def count_calls(function: Callable[..., Any], at: int, strike: Callable[[], None]) -> Callable[..., Any]:
    calls = 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            strike()
        return function(*arguments, **keywords)

    return wrapped


def strike(folder: Path, blow: Blow) -> None:
    if blow.victim < 0:
        (folder / "now").touch()  # the test kills all of them
        time.sleep(SECONDS_FOR_A_ROUND)
    os.kill(os.getpid(), blow.signal)


def work(
    rank: int, num_workers: int, port: int, folder: Path, memory_every_steps: int | None, blow: Blow | None
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, num_workers, port)
    try:
        with start_workers("gloo", TIMEOUT_SECONDS) as workers:
            train(workers, folder, memory_every_steps, blow)
    except WorkersLost as error:
        print(error)
        os._exit(1)
    except Preempted:
        sys.exit(0)


def train(workers: mbgd.Workers, folder: Path, memory_every_steps: int | None, blow: Blow | None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 30), torch.nn.Dropout(), torch.nn.Linear(30, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = mbgd.Settings(
        steps=NUM_STEPS,
        batch=mbgd.Batch(97),
        averaging=mbgd.Averaging(mbgd.AveragingName.reproducible),
        log_every_steps=1,
    )
    trainer = mbgd.Trainer(
        model,
        mbgd.CrossEntropy(),
        optimizer,
        mbgd.Data(train=digits("test"), evaluation=digits("test")),
        settings,
        workers,
    )
    keep = Checkpoint(every_steps=3, every_seconds=None, memory_every_steps=memory_every_steps)
    config = Config(steps=NUM_STEPS, checkpoint=keep)
    plain = dict.fromkeys(marked(Config)) | {
        "data": {},
        "batch": {"size": 97, "drop_last": False},
        "epochs": 1,
        "steps": 1,
    }
    run = open_run_folder(Run(dir=str(folder / "run")), "", workers, may_hold_a_run=True)
    assert resume(trainer, run, config, plain)
    checkpoints = saving.create(keep, run.path, run.checkpoints_path, must_match(plain), workers)
    tracker = None
    if workers.is_main:
        run.write_config(yaml.safe_dump(plain))
        tracker = JsonLines(run.metrics_path)
    if blow is not None and blow.victim in (-1, workers.rank):
        arm(trainer, folder, blow)
    trainer.fit(tracker, checkpoints, StopOnSignal(workers))
    if workers.is_main:
        (folder / "hash").write_text(weights_sha256(model))


def arm(trainer: mbgd.Trainer, folder: Path, blow: Blow) -> None:
    """Have the blow fall in the middle of the phase."""
    hit = partial(strike, folder, blow)
    if blow.phase == "forward":
        trainer.train_step.averaging.task = count_calls(trainer.train_step.averaging.task, blow.count, hit)  # type: ignore[method-assign]
    elif blow.phase == "averaging":
        trainer.train_step.averaging.finish = count_calls(trainer.train_step.averaging.finish, blow.count, hit)  # type: ignore[method-assign]
    elif blow.phase == "optimizer":
        trainer.setup.optimizer.step = count_calls(trainer.setup.optimizer.step, blow.count, hit)  # type: ignore[method-assign]
    elif blow.phase == "save":
        checkpoint.save_file = count_calls(checkpoint.save_file, blow.count, hit)  # type: ignore[attr-defined]
    else:
        Path.rename = count_calls(Path.rename, blow.count, hit)  # type: ignore[method-assign]


def play(folder: Path, round_: Round) -> None:
    """Start the workers, let the blow fall, and wait until none is left."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    (folder / "now").unlink(missing_ok=True)
    processes = [
        context.Process(
            target=work, args=(rank, round_.num_workers, port, folder, round_.memory_every_steps, round_.blow)
        )
        for rank in range(round_.num_workers)
    ]
    for process in processes:
        process.start()
    blow = round_.blow
    deadline = time.monotonic() + SECONDS_FOR_A_ROUND
    try:
        while any(process.is_alive() for process in processes):
            if blow is not None and blow.victim < 0 and (folder / "now").exists():
                for process in processes:
                    process.kill()
            stopped = blow is not None and blow.signal == signal.SIGSTOP and blow.victim >= 0
            others = [p for rank, p in enumerate(processes) if not (stopped and blow and rank == blow.victim)]
            if not any(process.is_alive() for process in others):
                break
            assert time.monotonic() < deadline, f"somebody hangs after {round_}"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if blow is None:
        assert [process.exitcode for process in processes] == [0] * len(processes)


def history(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@cache
def undisturbed() -> tuple[str, list[dict[str, Any]]]:
    with TemporaryDirectory() as folder:
        play(Path(folder), Round(1, None, None))
        return (Path(folder) / "hash").read_text(), history(Path(folder))


@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_whatever_happens_the_run_ends_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    for round_ in schedule(seed):
        play(tmp_path, round_)
    weights, lines = undisturbed()
    assert (tmp_path / "hash").read_text() == weights
    assert history(tmp_path) == lines
    assert not list((tmp_path / "run/checkpoints").glob("*broken*"))
    assert not saving.memory_path(tmp_path / "run").exists()


def test_the_schedules_strike_in_every_phase_and_with_every_signal() -> None:
    blows = [round_.blow for seed in range(NUM_RUNS) for round_ in schedule(seed) if round_.blow is not None]
    assert {blow.phase for blow in blows} == set(PHASES)
    assert {blow.signal for blow in blows} == {signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP}
