"""Seeded schedules of what may happen to a run, and the oracle: it goes on, and ends with the same bits and metrics.

Workers are killed, told to stop, or frozen in every phase of a step and of a save; the disk is full; the clock jumps;
files of the newest checkpoint are torn or lost between two starts. `test_chaos.py` plays some schedules, and
`make chaos RUNS=1000` many: `python tests/chaos.py` goes on where it was stopped.
"""

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

import mbgd
from mbgd import averaging
from mbgd.averaging.host_memory.memory import CannotShareError
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints import saving
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.checkpoints.memory_tier import memory_path
from mbgd.config import Checkpoint, Config, Run, must_match
from mbgd.config.must_match import marked
from mbgd.data import digits
from mbgd.errors import Preempted, WorkersLost
from mbgd.runs.resume import resume
from mbgd.runs.run_folder import open_run_folder
from mbgd.tracking.json_lines import JsonLines
from mbgd.workers.group import start_workers
from mbgd.workers.preemption import StopOnSignal

import seeded
from processes import environment, free_port

NUM_STEPS = 40
TIMEOUT_SECONDS = 4.0
SECONDS_FOR_A_ROUND = 60.0

IN_STEP = ("forward", "averaging", "optimizer", "sharing")
IN_SAVE = ("save", "rename")
PHASES = (*IN_STEP, *IN_SAVE)


class Kind(Enum):
    """What happens."""

    kill = "kill -9"
    terminate = "SIGTERM"
    freeze = "SIGSTOP"
    full_disk = "full disk"
    clock = "clock jumps"


SIGNALS = {Kind.kill: signal.SIGKILL, Kind.terminate: signal.SIGTERM, Kind.freeze: signal.SIGSTOP}
ENDS_ROUND = tuple(SIGNALS)


class Damage(Enum):
    """What becomes of the newest checkpoint between two starts."""

    torn = "torn file"
    empty = "empty file"
    lost = "lost file"


@dataclass(frozen=True)
class Blow:
    """In the `count`-th `phase` of the victim, something happens."""

    victim: int
    """A rank; −1: all workers at once."""
    phase: str
    count: int
    kind: Kind


@dataclass(frozen=True)
class Round:
    num_workers: int = 1
    memory_every_steps: int | None = None
    transport: str = "shared memory"
    sharding: str = "auto"
    blow: Blow | None = None
    damage: Damage | None = None
    """After the round."""


def schedule(seed: int) -> list[Round]:
    """Rounds of workers, each with a blow; the last one is left alone."""
    chance = random.Random(seed)
    rounds = []
    # Every phase has its turn as the seeds go by, whatever else chance says.
    for number in range(chance.randint(1, 3)):
        num_workers = chance.randint(1, 4)
        phase = PHASES[(seed + number) % len(PHASES)]
        in_save = phase in IN_SAVE
        kinds = [Kind.kill, Kind.kill, Kind.terminate, Kind.full_disk if in_save else Kind.clock]
        if num_workers > 1 and not in_save:
            kinds.append(Kind.freeze)
        blow = Blow(
            victim=0 if in_save else chance.choice([-1, *range(num_workers)]),  # the main worker saves
            phase=phase,
            count=chance.randint(1, 4 if in_save else 20),
            kind=chance.choice(kinds),
        )
        # Snapshots in memory would take the place of a damaged checkpoint.
        damage = chance.choice([None, None, *Damage])
        memory_every_steps = chance.choice([None, 1, 3]) if damage is None else None
        transport = chance.choice(["shared memory", "shared memory", "gloo"])
        sharding = chance.choice(["optimizer", "optimizer", "none"])
        rounds.append(Round(num_workers, memory_every_steps, transport, sharding, blow, damage))
    return [*rounds, Round(chance.randint(1, 4))]


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
    if blow.kind is Kind.full_disk:
        raise OSError(errno.ENOSPC, "No space left on device")
    if blow.kind is Kind.clock:
        now, jump = time.time, random.Random(blow.count).choice([-86400.0, 86400.0])
        time.time = lambda: now() + jump
        return
    if blow.victim < 0:
        (folder / "now").touch()  # the test kills all of them
        time.sleep(SECONDS_FOR_A_ROUND)
    os.kill(os.getpid(), SIGNALS[blow.kind])


def work(rank: int, port: int, folder: Path, round_: Round) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, round_.num_workers, port)
    if round_.transport == "gloo":
        averaging.HostMemory = _no_memory  # type: ignore[attr-defined, assignment]
    try:
        with start_workers("gloo", TIMEOUT_SECONDS) as workers:
            train(workers, folder, round_)
    except WorkersLost as error:
        print(error)
        os._exit(1)
    except Preempted:
        sys.exit(0)


def _no_memory(workers: mbgd.Workers) -> None:
    raise CannotShareError("this round has none")


def train(workers: mbgd.Workers, folder: Path, round_: Round) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 30), torch.nn.Dropout(), torch.nn.Linear(30, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = mbgd.Settings(
        steps=NUM_STEPS,
        batch=mbgd.Batch(97),
        averaging=mbgd.Averaging(mbgd.AveragingName.reproducible),
        sharding=round_.sharding,  # type: ignore[arg-type]
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
    keep = Checkpoint(every_steps=3, every_seconds=None, memory_every_steps=round_.memory_every_steps)
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
    if round_.blow is not None and round_.blow.victim in (-1, workers.rank):
        arm(trainer, folder, round_.blow)
    trainer.fit(tracker, checkpoints, StopOnSignal(workers))
    if workers.is_main:
        (folder / "hash").write_text(weights_sha256(model))


def arm(trainer: mbgd.Trainer, folder: Path, blow: Blow) -> None:
    """Have the blow fall in the middle of the phase."""
    hit, step = partial(strike, folder, blow), trainer.train_step
    places: dict[str, tuple[Any, str]] = {
        "forward": (step.averaging, "forward"),
        "averaging": (step.averaging, "finish"),
        "optimizer": (trainer.setup.optimizer, "step"),
        # With its own pieces updated, before those of the others are known to be; without pieces, after the update.
        "sharing": (step.noise_scale, "after_update") if step.sharded is None else (step.sharded.parameters, "spread"),
        "save": (checkpoint, "save_file"),
        "rename": (Path, "rename"),
    }
    owner, name = places[blow.phase]
    setattr(owner, name, count_calls(getattr(owner, name), blow.count, hit))


def damage(run: Path, kind: Damage, seed: int) -> bool:
    """Damage the newest checkpoint as a power failure may; False if there is only one, which may be all there is."""
    newest = checkpoint.complete(run / "checkpoints")
    if len(newest) < 2:
        return False
    path = random.Random(seed).choice(sorted(newest[0].iterdir()))
    if kind is Damage.lost:
        path.unlink()
    else:
        os.truncate(path, 0 if kind is Damage.empty else path.stat().st_size // 2)
    return True


def play(folder: Path, round_: Round) -> None:
    """Start the workers, let the blow fall, and wait until none is left."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    (folder / "now").unlink(missing_ok=True)
    processes = [context.Process(target=work, args=(rank, port, folder, round_)) for rank in range(round_.num_workers)]
    for process in processes:
        process.start()
    blow = round_.blow
    deadline = time.monotonic() + SECONDS_FOR_A_ROUND
    try:
        while any(process.is_alive() for process in processes):
            if (folder / "now").exists():
                for process in processes:
                    process.kill()
            stopped = blow is not None and blow.kind is Kind.freeze and blow.victim >= 0
            others = [p for rank, p in enumerate(processes) if not (stopped and blow and rank == blow.victim)]
            if not any(process.is_alive() for process in others):
                break
            assert time.monotonic() < deadline, f"somebody hangs after {round_}"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if blow is None or blow.kind not in ENDS_ROUND:
        assert [process.exitcode for process in processes] == [0] * len(processes)


def history(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@cache
def undisturbed() -> tuple[str, list[dict[str, Any]]]:
    """The weights' hash and the metrics of a run to which nothing happens."""
    with TemporaryDirectory() as folder:
        play(Path(folder), Round(sharding="none"))
        return (Path(folder) / "hash").read_text(), history(Path(folder))


def check(folder: Path, seed: int) -> list[Round]:
    """Play a schedule in an empty folder; AssertionError unless the run ends as if nothing had happened."""
    rounds = schedule(seed)
    for round_ in rounds:
        play(folder, round_)
        if round_.damage is not None:
            damage(folder / "run", round_.damage, seed)
    weights, lines = undisturbed()
    assert (folder / "hash").read_text() == weights
    assert history(folder) == lines
    assert not memory_path(folder / "run").exists()
    return rounds


def describe(seeds: Mapping[int, str]) -> str:
    """What happened in the schedules of these seeds, by kind; each with the error, or an empty text."""
    rounds = [round_ for seed in seeds for round_ in schedule(seed)]
    failed = {seed: error for seed, error in seeds.items() if error}
    lines = [
        f"{len(seeds):,} runs of {NUM_STEPS} steps in {len(rounds):,} starts; {len(failed)} did not end as they must",
        "",
    ]
    blows = [round_.blow for round_ in rounds if round_.blow is not None]
    lines.append(f"{'':<14}" + "".join(f"{phase:>11}" for phase in PHASES))
    for kind in Kind:
        counts = [sum(blow.kind is kind and blow.phase == phase for blow in blows) for phase in PHASES]
        lines.append(f"{kind.value:<14}" + "".join(f"{count:>11}" for count in counts))
    lines.append("")
    for name, counted in (
        ("all workers at once", Counter(blow.victim < 0 for blow in blows)[True]),
        *((kind.value, Counter(round_.damage for round_ in rounds)[kind]) for kind in Damage),
        *((transport, count) for transport, count in Counter(round_.transport for round_ in rounds).items()),
        *((f"{n} workers", count) for n, count in sorted(Counter(round_.num_workers for round_ in rounds).items())),
    ):
        lines.append(f"{name:<22}{counted:>8}")
    return "\n".join([*lines, *(f"seed {seed}: {error}" for seed, error in sorted(failed.items()))])


if __name__ == "__main__":
    seeded.main(__doc__ or "", check, describe, "runs/chaos.jsonl")
