"""Seeded schedules of lost workers under recovery=continue, and the oracle: same bits, same metrics, one start.

`test_recovery.py` plays some schedules, and `make recovery RUNS=200` many: `python tests/survivors.py` goes on where it
was stopped.
"""

import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import seeded
from own_processes import started_by_user
from struck import HALF_UPDATED, OVER_GLOO, SLOW, STRIKES

NUM_STEPS = 40
SECONDS_FOR_A_RUN = 180
PROGRAM = str(Path(__file__).with_name("struck.py"))
OVERRIDES = [
    "model=own",
    "model._target_=struck.Small",
    "averaging=reproducible",
    f"steps={NUM_STEPS}",
    "batch.size=97",
    "log_every_steps=1",
    "evaluation.every_steps=6",
    "early_stopping.patience=50",
    "ema.decay=0.9",
    "checkpoint.every_steps=5",
    "tracking.report=false",
    "run.dir=run",
]
COUNTS = {
    "forward": 120,
    "averaging": NUM_STEPS,
    "sums": NUM_STEPS,
    "optimizer": NUM_STEPS,
    "observers": NUM_STEPS,
    "logging": NUM_STEPS,
    "checking": 12,
    "evaluating": 6,
    "asking": 6,
    "saving": 20,
    "agreeing": NUM_STEPS,
    "ending": 1,
    "results": 1,
    "forming": 2,
    "building": 2,
    "handing over": 2,
}
"""By phase: about how often it comes in a run on a worker."""
COUNTS_OF_SHARDING = {HALF_UPDATED: NUM_STEPS, "keeping": NUM_STEPS, "spreading": NUM_STEPS}
OF_THE_MAIN_WORKER = ("saving", "results")
AT_THE_SECOND_START = ("forming", "building", "handing over")


@dataclass(frozen=True)
class Strike:
    seat: int
    phase: str
    count: int
    kind: float = signal.SIGKILL
    """A signal, or how many seconds late the worker comes: negative."""


@dataclass(frozen=True)
class Schedule:
    num_workers: int
    strikes: tuple[Strike, ...]
    num_spare: int = 0
    over_gloo: bool = False
    is_sharded: bool = False
    overrides: tuple[str, ...] = ()


def schedule(seed: int) -> Schedule:
    """One to W − 1 of W workers are lost; sometimes another comes late just then, or others take their places."""
    chance = random.Random(seed)
    num_workers = chance.randint(2, 4)
    seats = chance.sample(range(num_workers), chance.randint(1, num_workers - 1))
    strikes: list[Strike] = []
    phases = [*COUNTS]
    for number, seat in enumerate(seats):
        phase = phases[(seed + number) % len(phases)]
        if phase in OF_THE_MAIN_WORKER and number == 0:
            seat = 0
        if phase in AT_THE_SECOND_START and number == 0:
            phase = "averaging"  # something must have been lost for it to come
        if any(one.seat == seat for one in strikes):
            continue
        least = 2 if phase in AT_THE_SECOND_START else 1
        kind = signal.SIGSTOP if chance.random() < 0.12 else signal.SIGKILL
        strikes.append(Strike(seat, phase, chance.randint(least, COUNTS[phase]), kind))
    num_spare, over_gloo, is_sharded = chance.choice([0, 0, 2]), chance.random() < 1 / 3, chance.random() < 0.5
    if is_sharded:
        phase = chance.choice([*COUNTS_OF_SHARDING])
        strikes[0] = replace(strikes[0], phase=phase, count=chance.randint(1, COUNTS_OF_SHARDING[phase]))
    left = [seat for seat in range(num_workers) if all(one.seat != seat for one in strikes)]
    if chance.random() < 1 / 2:
        strikes.append(replace(strikes[0], seat=chance.choice(left), kind=-0.5))
    return Schedule(num_workers, tuple(strikes), num_spare, over_gloo, is_sharded)


def play(folder: Path, plan: Schedule) -> str:
    """Run it in an empty folder; returns what was printed."""
    strikes = [[one.seat, one.phase, one.count, float(one.kind)] for one in plan.strikes]
    environment = {STRIKES: json.dumps(strikes), "OMP_NUM_THREADS": "1"} | ({OVER_GLOO: "1"} if plan.over_gloo else {})
    if plan.num_spare:
        environment[SLOW] = "0.05"
    launcher = [f"workers={plan.num_workers}", "recovery=continue", f"--max-restarts={plan.num_spare}"]
    # Only where a worker stops do the others wait as long; waiting otherwise is a fault, and takes too long for a run.
    seconds = 6 if any(one.kind is signal.SIGSTOP for one in plan.strikes) else 600
    launcher += ["sharding=optimizer"] if plan.is_sharded else []
    command = [sys.executable, PROGRAM, *launcher, *OVERRIDES, f"backend.timeout_seconds={seconds}", *plan.overrides]
    with started_by_user(command, folder, environment) as process:
        code = process.wait(SECONDS_FOR_A_RUN)
        said = (folder / "log").read_text()
        assert code == 0, f"exit code {code} of {plan}: {said.splitlines()[-1:]}"
    return said


def history(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run/summary.json").read_text())
    return found


@cache
def undisturbed(overrides: tuple[str, ...] = ()) -> tuple[str, list[dict[str, Any]]]:
    """The weights' hash and the metrics of a run to which nothing happens, on one worker."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        with started_by_user([sys.executable, PROGRAM, *OVERRIDES, *overrides], folder, {STRIKES: "[]"}) as process:
            assert process.wait(SECONDS_FOR_A_RUN) == 0, (folder / "log").read_text()
        return summary(folder)["weights_sha256"], history(folder)


def check(folder: Path, plan: Schedule) -> str:
    """Play it; AssertionError unless the run ends as if nothing had happened. Returns what was printed."""
    said = play(folder, plan)
    weights, lines = undisturbed(plan.overrides)
    assert summary(folder)["weights_sha256"] == weights, f"other weights after {plan}"
    found = history(folder)
    different = next((pair for pair in zip_longest(found, lines) if pair[0] != pair[1]), None)
    assert different is None, f"other metrics, such as {different}, after {plan}; steps {[o['step'] for o in found]}"
    assert "restart " not in said, f"started again after {plan}"
    return said


def describe(seeds: Mapping[int, str]) -> str:
    """What happened in the schedules of these seeds; each with the error, or an empty text."""
    plans, failed = [schedule(seed) for seed in seeds], {seed: error for seed, error in seeds.items() if error}
    strikes = [strike for plan in plans for strike in plan.strikes if strike.kind > 0]
    lines = [
        f"{len(plans):,} runs of {NUM_STEPS} steps, {len(strikes):,} workers struck; {len(failed)} did not end as they "
        "must",
        "",
        f"{'':<14}{'kill -9':>10}{'SIGSTOP':>10}",
    ]
    for phase in COUNTS | COUNTS_OF_SHARDING:
        counts = Counter(one.kind for one in strikes if one.phase == phase)
        lines.append(f"{phase:<14}{counts[signal.SIGKILL]:>10}{counts[signal.SIGSTOP]:>10}")
    lines.append("")
    for name, count in (
        *((f"{n} workers", Counter(plan.num_workers for plan in plans)[n]) for n in (2, 3, 4)),
        ("another comes late", sum(any(one.kind < 0 for one in plan.strikes) for plan in plans)),
        ("others take their place", sum(plan.num_spare > 0 for plan in plans)),
        ("over gloo", sum(plan.over_gloo for plan in plans)),
        ("sharding=optimizer", sum(plan.is_sharded for plan in plans)),
    ):
        lines.append(f"{name:<26}{count:>8}")
    return "\n".join([*lines, *(f"seed {seed}: {error}" for seed, error in sorted(failed.items()))])


if __name__ == "__main__":
    seeded.main(__doc__ or "", lambda folder, seed: check(folder, schedule(seed)), describe, "runs/recovery.jsonl")
