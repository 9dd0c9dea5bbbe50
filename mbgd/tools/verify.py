"""Whether the workers' average is right for this model, data and objective; if not, why."""

import argparse
import json
import sys
from pathlib import Path

from mbgd.errors import UsageError

DESCRIPTION = "compare a few steps of all workers with one worker alone; find out why, where they differ"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: model=… data=… batch.size=…"
    )
    parser.add_argument("--workers", type=int, default=3, help="how many to start (default 3); torchrun's, under it")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are compared (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="at most for measuring the workers (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there; - : print that alone")


def main(parsed: argparse.Namespace) -> int:
    """0 if the average is exact or within rounding, 1 if it is wrong."""
    from mbgd.verify import starting

    if parsed.workers < 1 or parsed.steps < 1 or not parsed.seconds > 0:
        raise UsageError("--workers and --steps are whole numbers ≥ 1, and --seconds is a number > 0.")
    if starting.is_a_worker() or parsed.workers == 1:
        return work(parsed)
    return starting.start(sys.argv[1:], parsed.workers)


def work(parsed: argparse.Namespace) -> int:
    """On each worker."""
    from mbgd.build import typed
    from mbgd.composing import compose
    from mbgd.verify.verifying import verify
    from mbgd.verify.wording import describe
    from mbgd.workers import start_workers

    config = typed(compose(parsed.overrides))
    with start_workers(config.backend.name.value, config.backend.timeout_seconds) as workers:
        result = verify(config, workers, parsed.steps, parsed.seconds)
        is_wrong = bool(workers.broadcast(result["verdict"] == "WRONG"))
    if workers.is_main:
        text = json.dumps(result, indent=1)
        if str(parsed.json) == "-":
            print(text)
        else:
            print(describe(result))
            if parsed.json is not None:
                parsed.json.write_text(text + "\n")
    return int(is_wrong)
