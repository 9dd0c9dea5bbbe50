"""From the command to the end of a run of one step, against a bare script: `python benchmarks/startup.py`.

Both start under torchrun, load the digits, and make one step of the same model; train.py also checks the configuration
and the model, logs, and writes its run's folder, without an evaluation. Interleaved rounds, so that a noisy machine
slows both equally.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import publish

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def seconds(num_workers: int, script: str, *arguments: str) -> float:
    command = [*TORCHRUN, str(num_workers), str(ROOT / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    lines = [f"{'workers':<10}{'bare script':>14}{'train.py':>12}{'train.py / bare':>18}{'(range)':>16}"]
    for num_workers in arguments.workers:
        bare, ours = [], []
        for _ in range(arguments.rounds + 1):  # the first round warms the disk's cache
            bare.append(seconds(num_workers, "benchmarks/bare.py"))
            ours.append(seconds(num_workers, "train.py", "steps=1", "data.evaluation=null"))
        ratios = [b / a for a, b in zip(bare[1:], ours[1:], strict=True)]
        lines.append(
            f"{num_workers:<10}{statistics.median(bare[1:]):>12.2f} s{statistics.median(ours[1:]):>10.2f} s"
            f"{statistics.median(ratios):>18.2f}{f'({min(ratios):.2f}–{max(ratios):.2f})':>16}"
        )
    publish("startup", "Command to end of a run of one step, medians of interleaved rounds.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
