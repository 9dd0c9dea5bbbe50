"""Makes the page of a run again from its folder, or one page of several runs; follows a run; exports its curves."""

import argparse
from functools import partial
from pathlib import Path

from mbgd.cli.tools.output import write
from mbgd.errors import UsageError

DESCRIPTION = "a page of a run, of several, or of all runs under a folder; --watch follows them; --csv exports curves"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder with runs in it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the folder; of several folders, here"
    )
    what.add_argument("--watch", action="store_true", help="follow the runs in a page for this machine's browser")
    what.add_argument("--csv", type=Path, metavar="FILE", help="write every value of the curves, not the page")
    parser.add_argument("--port", type=int, metavar="N", help="of --watch; default: one that is free")


def main(parsed: argparse.Namespace) -> int:
    """Write the page, or the curves, and print where; or serve the page until Ctrl-C."""
    if parsed.port is not None and not (parsed.watch and 0 < parsed.port < 2**16):
        raise UsageError(f"--port {parsed.port}: it goes with --watch and is a number from 1 to 65535.")
    if parsed.watch:
        from mbgd.report.watch import watch

        watch(parsed.runs, parsed.port or 0)
    elif parsed.csv:
        from mbgd.report.export import write_csv

        write(parsed.csv, partial(write_csv, parsed.runs))
        print(f"curves      {parsed.csv}")
    else:
        from mbgd.files.run_files import REPORT
        from mbgd.report.writing import write_report

        path = parsed.output or (parsed.runs[0] / REPORT if len(parsed.runs) == 1 else Path(REPORT))
        write(path, partial(write_report, parsed.runs))
        print(f"report      {path}")
    return 0
