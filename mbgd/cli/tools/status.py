"""Shows how far a run is, and where, from its folder alone."""

import argparse
from pathlib import Path

from mbgd.runs import status

DESCRIPTION = "how far a run is: step, rate, time left, workers, hosts, last checkpoint, last error"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")


def main(parsed: argparse.Namespace) -> int:
    """Print a block for each run."""
    for number, folder in enumerate(parsed.runs):
        if number:
            print()
        for name, value in status.describe(folder).items():
            print(f"{name:<11} {value}")
    return 0
