"""Checks whether the workers' average is right for this model, data and objective; if not, says why."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbgd.cli.tools.output import write
from mbgd.errors import UsageError

DESCRIPTION = "compare a few steps of all workers with those of one worker; if they differ, find out why"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: model=… data=… batch.size=…"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="replay a run (give only its folder) up to step N instead"
    )
    parser.add_argument("--workers", type=int, default=3, help="how many to start (default 3); torchrun's, under it")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are compared (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="at most for measuring the workers (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there; - : print only that")


def main(parsed: argparse.Namespace) -> int:
    """0 if the average is exact or within rounding, 1 if it is wrong."""
    from mbgd.verify import starting

    if parsed.workers < 1 or parsed.steps < 1 or not parsed.seconds > 0:
        raise UsageError("--workers and --steps are whole numbers ≥ 1, and --seconds is a number > 0.")
    if parsed.step is not None and (len(parsed.overrides) != 1 or not Path(parsed.overrides[0]).is_dir()):
        raise UsageError("--step N replays a run: give its folder, and nothing else.")
    if starting.is_a_worker() or parsed.workers == 1:
        return work(parsed)
    return starting.start(sys.argv[1:], parsed.workers)


def work(parsed: argparse.Namespace) -> int:
    """Called on each worker."""
    return _verify(parsed) if parsed.step is None else _replay(parsed)


def _replay(parsed: argparse.Namespace) -> int:
    from mbgd.verify.replay import describe, replay
    from mbgd.workers.group import start_workers

    with start_workers() as workers:
        result = replay(Path(parsed.overrides[0]), parsed.step, workers)
    if workers.is_main:
        _tell(parsed, asdict(result), describe(result, workers.num_workers))
    return int(result.first_difference is not None)


def _verify(parsed: argparse.Namespace) -> int:
    from mbgd.building.build import typed
    from mbgd.building.composing import compose
    from mbgd.verify.verifying import verify
    from mbgd.verify.wording import describe
    from mbgd.workers.group import start_workers

    config = typed(compose(parsed.overrides))
    with start_workers(config.backend.name.value, config.backend.timeout_seconds) as workers:
        result = verify(config, workers, parsed.steps, parsed.seconds)
        is_wrong = bool(workers.broadcast(result["verdict"] == "WRONG"))
    if workers.is_main:
        _tell(parsed, result, describe(result))
    return int(is_wrong)


def _tell(parsed: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print the text, or with `--json -` everything as JSON; `--json FILE` writes the JSON there, too."""
    values = json.dumps(result, indent=1)
    print(values if str(parsed.json) == "-" else text)
    if parsed.json is not None and str(parsed.json) != "-":
        write(parsed.json, lambda path: path.write_text(values + "\n"))
