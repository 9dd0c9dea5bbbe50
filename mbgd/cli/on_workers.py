"""Tools that compute with a run on any number of workers, which are started as those of `mbgd train` are."""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from mbgd.cli import launching, telling
from mbgd.errors import UsageError
from mbgd.text import plain_output
from mbgd.workers.log import guard_output

NUMBER = "workers=N and the options of torchrun are as for mbgd train (docs/launching.md)."


def run(name: str, arguments: Sequence[str]) -> int:
    """Run `mbgd NAME ARGUMENTS`, here or on workers that this process starts; the exit code."""
    plain_output.start()
    guard_output()
    launching.end_silently_at_interrupt()
    try:
        return _run(name, arguments)
    except UsageError as error:
        telling.tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(name: str, arguments: Sequence[str]) -> int:
    tool = import_module(f"mbgd.cli.tools.{name}")
    launching.program[:] = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    wanted, rest = launching.split(arguments)
    parser = argparse.ArgumentParser(f"mbgd {name}", description=tool.DESCRIPTION, epilog=NUMBER, allow_abbrev=False)

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}. `mbgd {name} --help` shows what there is.")

    parser.error = refuse  # type: ignore[method-assign]
    tool.arguments(parser)
    parsed = parser.parse_intermixed_args(rest)
    tool.check(parsed)
    if launching.started_by_launcher():
        launching.check_started(wanted)
    elif wanted.starts_processes:
        return launching.launch(wanted, rest)
    from mbgd.cli import failing  # torch is slow to import

    with failing.explained(tool.DOING):
        exit_code: int = tool.main(parsed)
    return exit_code


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which weights compute on which data."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder; the run may still be going on")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="other data or settings than the run's: data=… precision=…",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the best weights by the run's checkpoint.best")
    which.add_argument("--step", type=int, metavar="N", help="the weights after step N (default: the last)")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights, if the run keeps one")
