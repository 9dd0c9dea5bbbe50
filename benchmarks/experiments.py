"""Checks that the experiments in conf/experiment/ reach their stated results: `python benchmarks/experiments.py`.

On two workers; large_batch also runs with the small minibatch of its comparison, and with LAMB and LARS.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import publish

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "conf/experiment"
GOAL = re.compile(r"^# Reaches (eval/\w+) ([≥≤]) ([\d.]+)", re.MULTILINE)
VARIANTS = {
    "large_batch": {
        "minibatch of 64": ("batch.size=64", "optimizer.lr=0.02", "schedule.warmup_steps=0"),
        "LAMB": ("optimizer=lamb", "optimizer.lr=0.02"),
        "LARS": ("optimizer=lars", "optimizer.lr=12"),
    }
}
"""Experiment → name → overrides of its other runs."""


def goal(experiment: str) -> tuple[str, str, float]:
    """What the experiment's file states: metric, ≥ or ≤, value."""
    found = GOAL.search((EXPERIMENTS / f"{experiment}.yaml").read_text())
    assert found is not None, f"{experiment} states no goal"
    return found[1], found[2], float(found[3])


def run(experiment: str, variant: str = "") -> str:
    """One line of the result."""
    overrides = VARIANTS[experiment][variant] if variant else ()
    metric, relation, wanted = goal(experiment)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        command += [str(ROOT / "train.py"), f"experiment={experiment}", f"run.dir={folder}/run", *overrides]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        seconds = time.perf_counter() - start
        got = json.loads(Path(folder, "run/summary.json").read_text())["metrics"][metric]
    name = f"{experiment}, {variant}" if variant else experiment
    return f"{name:<34}{f'{metric} {relation} {wanted}':<26}{got:<10.4f}{seconds:>6.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", default=sorted(path.stem for path in EXPERIMENTS.glob("*.yaml")))
    lines = [f"{'experiment':<34}{'its file states':<26}{'reached':<10}{'took':>8}"]
    for experiment in parser.parse_args().experiments:
        lines.append(run(experiment))
        lines += [run(experiment, variant) for variant in VARIANTS.get(experiment, ())]
    publish("experiments", "Two workers; from the command to its end.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
