"""Makes the report of a run again from its folder, or one report that compares several runs."""

import argparse
from pathlib import Path

from mbgd.report import write_report

DESCRIPTION = "remake a run's report.html, or compare several runs in one page"
FILE = "report.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: {FILE} in the run's folder; of several, here"
    )


def main(parsed: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    path = parsed.output or (parsed.runs[0] / FILE if len(parsed.runs) == 1 else Path(FILE))
    write_report(parsed.runs, path)
    print(f"report      {path}")
    return 0
