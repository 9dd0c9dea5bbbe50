"""Writes the predictions of a run's weights for every evaluation example into a file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mbgd.cli import on_workers
from mbgd.errors import UsageError
from mbgd.text.escaping import plain
from mbgd.text.suggestions import did_you_mean

if TYPE_CHECKING:
    from mbgd.cli.reopened import Reopened
    from mbgd.evaluation.evaluator import Evaluator

DESCRIPTION = "write a run's predictions into a file: mbgd predict RUN out=FILE.npz workers=2 data=…"
DOING = "predicting"
OUT = "out="


def arguments(parser: argparse.ArgumentParser) -> None:
    on_workers.arguments(parser)
    parser.add_argument(
        "--set", metavar="NAME", dest="name", help="the evaluation set, if data.evaluation names several"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if there is one")
    parser.epilog = f"{OUT}FILE is a .safetensors, .npz or .csv file (docs/evaluate.md). {parser.epilog or ''}"


def check(parsed: argparse.Namespace) -> None:
    """Take out= from the overrides; UsageError if it cannot be written."""
    from mbgd.files import arrays

    named = [one.removeprefix(OUT) for one in parsed.overrides if one.startswith(OUT)]
    parsed.overrides = [one for one in parsed.overrides if not one.startswith(OUT)]
    if len(named) != 1 or not named[0]:
        got = f"{len(named)} are given" if len(named) > 1 else "none is given"
        raise UsageError(f"predict writes one file, out=FILE, and {got}. Such as out=predictions.npz.")
    parsed.out = Path(named[0])
    arrays.check_name(parsed.out)
    if parsed.out.is_dir():
        raise UsageError(f"{OUT}{plain(parsed.out)} is a folder. Name a file.")
    if not parsed.out.parent.is_dir():
        raise UsageError(f"{OUT}{plain(parsed.out)}: there is no folder {plain(parsed.out.parent)}. Make it first.")
    if parsed.out.exists() and not parsed.overwrite:
        raise UsageError(f"{OUT}{plain(parsed.out)} is there already. Name another file, or add --overwrite.")


def main(parsed: argparse.Namespace) -> int:
    """Called on each worker; the main one writes the file."""
    from mbgd.cli.reopened import reopened
    from mbgd.cli.tools.output import write
    from mbgd.evaluation.predictions import parts_of, predict
    from mbgd.files import arrays

    with reopened(parsed) as run:
        workers = run.trainer.setup.workers
        evaluator = _chosen(run, parsed.name)
        arrays.check_shapes(parsed.out, parts_of(evaluator.first()[1]))
        found = predict(evaluator, workers)
        if workers.is_main:
            write(parsed.out, lambda path: arrays.write(path, found))
            kinds = [
                f"{name} {tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}" for name, one in found.items()
            ]
            lines = {**run.lines(), "predictions": ", ".join(kinds), "file": plain(parsed.out)}
            print("\n".join(f"{name:<11} {value}" for name, value in lines.items()), flush=True)
    return 0


def _chosen(run: "Reopened", name: str | None) -> "Evaluator":
    """The evaluator of the set of this name, or of the only one."""
    by_name = run.trainer.evaluations.by_name
    if name is None and len(by_name) == 1:
        return next(iter(by_name.values()))
    named = ", ".join(one for one in by_name if one)
    if name is None:
        raise UsageError(f"there are {len(by_name)} evaluation sets, {named}; one file holds one. Use --set NAME.")
    if name not in by_name or not name:
        known = f"there are {named}" if named else "there is one, which has no name: leave --set out"
        raise UsageError(f"--set {plain(name)}: there is no such evaluation set; {known}.{did_you_mean(name, by_name)}")
    return by_name[name]
