"""mbgd and other trainers on the same workloads: `python benchmarks/peers.py`.

`pip install -r benchmarks/peers-requirements.txt` first, in a separate environment. Each training is a fresh start
under torchrun, in interleaved rounds, so that a noisy machine slows all equally. Speed is measured over the steps
after the first quarter; startup is from the command to the end of the first optimizer step. Ratios are medians over
rounds of the other trainer's time divided by mbgd's; > 1: mbgd is faster. benchmarks/peer.py holds each trainer's code.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import publish

SCRIPT = Path(__file__).with_name("peer.py")
TRAINERS = ("mbgd", "mbgd, averaging=ddp", "by hand", "Lightning", "Accelerate", "HF Trainer", "Ignite")
WORKS = {"digits MLP": 64, "6.4 M MLP": 128, "cnn 28 × 28": 128}
"""Minibatches."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@dataclass(frozen=True)
class Timing:
    start_seconds: float
    step_seconds: float


def train(trainer: str, work: str, num_workers: int) -> Timing:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "times.json")
        begin = time.monotonic()  # which is the same in every process
        done = subprocess.run(
            [*TORCHRUN, str(num_workers), str(SCRIPT), trainer, work, str(file)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{trainer} failed on {work}:\n{done.stderr[-4000:]}")
        times = json.loads(file.read_text())
    skipped = len(times) // 4
    return Timing(times[0] - begin, (times[-1] - times[skipped]) / (len(times) - 1 - skipped))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lines = [
        f"{'':<13}{'workers':>8}  {'':<21}{'examples/s':>12}{'time / mbgd':>13}{'(range)':>14}{'first step':>13}"
        f"{'time / mbgd':>13}{'(range)':>14}"
    ]
    for work, minibatch in WORKS.items():
        for num_workers in arguments.workers:
            rounds = [{name: train(name, work, num_workers) for name in TRAINERS} for _ in range(arguments.rounds + 1)][
                1:
            ]  # the first one warms the disk's cache
            for name in TRAINERS:
                steps = [timings[name].step_seconds for timings in rounds]
                starts = [timings[name].start_seconds for timings in rounds]
                lines.append(
                    f"{work:<13}{num_workers:>8}  {name:<21}{minibatch / statistics.median(steps):>12,.0f}"
                    + ratio(steps, [timings["mbgd"].step_seconds for timings in rounds])
                    + f"{statistics.median(starts):>11.2f} s"
                    + ratio(starts, [timings["mbgd"].start_seconds for timings in rounds])
                )
    publish("peers", "Medians of rounds in turn; fused AdamW for all.\n\n" + "\n".join(lines))


def ratio(times: list[float], ours: list[float]) -> str:
    ratios = [other / own for other, own in zip(times, ours, strict=True)]
    return f"{statistics.median(ratios):>13.2f}{f'({min(ratios):.2f}–{max(ratios):.2f})':>14}"


if __name__ == "__main__":
    main()
