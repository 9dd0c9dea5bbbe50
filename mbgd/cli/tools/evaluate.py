"""Evaluates the weights of a finished or running run, on its own evaluation data or on other data."""

import argparse
import json
from pathlib import Path

from mbgd.cli import on_workers
from mbgd.cli.tools.output import write
from mbgd.files import strict_json

DESCRIPTION = "evaluate a run's weights, on its own or other data: mbgd evaluate RUN workers=2 data=…"
DOING = "the evaluation"


def arguments(parser: argparse.ArgumentParser) -> None:
    on_workers.arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there; - : print only that")


def check(parsed: argparse.Namespace) -> None:
    """Nothing to check before workers start."""


def main(parsed: argparse.Namespace) -> int:
    """Called on each worker; the main one prints the metrics."""
    from mbgd.cli.reopened import reopened

    with reopened(parsed) as run:
        metrics = run.trainer.evaluate()
        workers = run.trainer.setup.workers
        if not workers.is_main:
            return 0
        values = {
            "run": str(parsed.run),
            "weights": str(run.weights.path),
            "step": run.weights.step,
            "weights_sha256": run.trainer.weights_sha256(),
            "num_workers": workers.num_workers,
            "num_examples": {f"eval/{name}".rstrip("/"): n for name, n in run.trainer.evaluations.num_examples.items()},
            "metrics": metrics,
        }
        text = json.dumps(json.loads(strict_json.dumps(values)), indent=1)
        if str(parsed.json) == "-":
            print(text, flush=True)
            return 0
        if parsed.json is not None:
            write(parsed.json, lambda path: path.write_text(text + "\n"))
        width = max(11, *map(len, metrics))
        lines = {**run.lines(), **{name: f"{value:.6g}" for name, value in metrics.items()}}
        print("\n".join(f"{name:<{width}} {value}" for name, value in lines.items()), flush=True)
    return 0
