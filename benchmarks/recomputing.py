"""`check.recompute_every_steps`: detected bit flips, wrong accusations, and cost.

`python benchmarks/recomputing.py`. Three workers; a bit is flipped in one worker's gradient, activation or parameter
at a random step, for each seed.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

from mbgd import Workers

from faulty_hardware import flips, make_trainer
from machine import as_worker, publish

NUM_WORKERS = 3
KINDS = ["gradient", "activation", "parameter"]
COSTS = [None, 100, 10, 1]
STEPS, ROUNDS = 400, 5


def named(told: dict[str, Any]) -> bool:
    """Whether the error names the step and the worker, and nothing was updated."""
    workers = re.findall(r"worker (\d) \(host", told["error"])
    is_step = told["error"].startswith(f"step {told['step'] + 1}: ")
    return is_step and workers == [str(told["victim"])] and not told["was_updated"]


def false_alarms(workers: Workers, num_steps: int) -> float:
    """Seconds of that many steps, all of them checked; an alarm would raise."""
    trainer = make_trainer(workers, seed=0, every_steps=1, num_steps=num_steps)
    start = time.monotonic()
    trainer.fit()
    return time.monotonic() - start


def cost(workers: Workers, every_steps: int | None) -> float:
    """Seconds of a step."""
    trainer = make_trainer(workers, seed=0, every_steps=every_steps, num_steps=STEPS)
    start = time.monotonic()
    trainer.fit()
    return (time.monotonic() - start) / STEPS


def work(rank: int, port: int, num_seeds: int, num_steps: int) -> None:
    with as_worker(rank, NUM_WORKERS, port) as workers:
        lines = [*found(workers, num_seeds), "", *quiet(workers, num_steps), "", *costs(workers, cost)]
    if rank == 0:
        publish("recomputing", "\n".join(lines))


def found(workers: Workers, num_seeds: int) -> list[str]:
    head = f"{'one bit of one worker’s':24}{'seeds':>7}{'named before the update':>25}"
    lines = [head + f"{'changed no bit of the gradient':>32}"]
    for kind in KINDS:
        told = [one for _, _, one in flips(workers, [kind], list(range(num_seeds)))]
        harmless = [one for one in told if not one["error"]]
        lines.append(f"{kind:24}{len(told):>7}{sum(map(named, told)):>25}{len(harmless):>32}")
    return lines


def quiet(workers: Workers, num_steps: int) -> list[str]:
    seconds = false_alarms(workers, num_steps)
    return [f"{num_steps:,} steps, each of them checked, without a fault: 0 alarms ({seconds:.0f} s)"]


def costs(workers: Workers, measure: Callable[[Workers, int | None], float]) -> list[str]:
    times: dict[int | None, list[float]] = {every: [] for every in COSTS}
    for _ in range(ROUNDS):
        for every in COSTS:
            times[every].append(measure(workers, every))
    lines = [f"Time of a step of 6 micro-batches on {NUM_WORKERS} workers; medians of {ROUNDS} rounds in turn."]
    for every, of_rounds in times.items():
        median = statistics.median(of_rounds)
        ratio = median / statistics.median(times[None])
        lines.append(f"recompute_every_steps={every or 'null':<6}{1e3 * median:8.2f} ms{ratio:8.2f}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=29561)
    parser.add_argument("--seeds", type=int, default=120)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.multiprocessing.start_processes(
        work, args=(arguments.port, arguments.seeds, arguments.steps), nprocs=NUM_WORKERS, start_method="forkserver"
    )
