"""Writes the script of a job and submits it: `mbgd launch slurm --nodes 2 --workers 4 -- ARGUMENTS`."""

import argparse
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from mbgd.cli import launching, slurm
from mbgd.cli.tools.output import write
from mbgd.errors import UsageError
from mbgd.files.atomic import write_atomically
from mbgd.text.escaping import plain

DESCRIPTION = "train as a SLURM job: write its script and submit it"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", choices=["slurm"])
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes; default: 1")
    parser.add_argument("--workers", default="auto", help="workers of each node: a number, gpus, or auto (the default)")
    parser.add_argument("--time", metavar="LIMIT", help="the job's time limit, such as 4:00:00; it resumes after it")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further option of sbatch; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.epilog = "After -- follow the arguments of mbgd train."


def main(parsed: argparse.Namespace) -> int:
    """Write the script next to the run's folder and submit it."""
    launching.check(parsed.workers)
    if parsed.nodes < 1:
        raise UsageError(f"--nodes {parsed.nodes}; it must be a whole number >= 1.")
    overrides, folder = with_folder(parsed.of_train)
    text = script(parsed, overrides, folder)
    if parsed.dry_run:
        print(text, end="")
        return 0
    path = folder.with_name(f"{folder.name}.sbatch")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda to: write_atomically(to, text.encode()))
    print(f"script      {plain(path)}\nfolder      {plain(folder)}")
    job = slurm.submit(path)
    print(f"job         {plain(job)}\nwatch       mbgd status {shlex.quote(str(folder))}\nstop        scancel {job}")
    return 0


def with_folder(overrides: Sequence[str]) -> tuple[list[str], Path]:
    """(arguments for mbgd train, the run's folder), which is fixed before the job starts: it resumes there."""
    for one in overrides:
        if one.startswith("workers="):
            raise UsageError(f"{one} after --. Give it as --{one.replace('=', ' ')}: how many each node starts.")
        if one in ("-m", "--multirun"):
            raise UsageError(f"{one}: a job trains one run. To sweep: mbgd train -m hydra/launcher=slurm …")
    given = [one.partition("=")[2] for one in overrides if one.startswith("run.dir=")]
    if any(one.startswith(("run.id=", "run.root=")) for one in overrides):
        raise UsageError("run.id or run.root with mbgd launch slurm. Give the folder itself: run.dir=FOLDER.")
    name = f"slurm-{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.urandom(3).hex()}"
    folder = Path.cwd() / (given[-1] if given else Path("runs", name))
    rest = [one for one in overrides if not one.startswith("run.dir=")]
    value = str(folder) if re.fullmatch(r"[\w./-]+", str(folder)) else launching.quoted(str(folder))
    return [f"run.dir={value}", *rest], folder


def script(parsed: argparse.Namespace, overrides: Sequence[str], folder: Path) -> str:
    """The job's script."""
    options = [f"--nodes={parsed.nodes}", f"--output={folder}.out", f"--job-name={folder.name}"]
    options += [f"--chdir={Path.cwd()}", *([f"--time={parsed.time}"] if parsed.time else []), *parsed.sbatch]
    settings = [f"set -- {shlex.join(overrides)}"]
    return slurm.script(options, workers=parsed.workers, program=["-m", "mbgd", "train"], settings=settings)
