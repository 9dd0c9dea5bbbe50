"""How one step of minibatch gradient descent updates the weights, example by example: numbers and a page."""

import argparse
import json
from pathlib import Path

from mbgd.cli.tools.output import write
from mbgd.errors import UsageError

DESCRIPTION = "show on real numbers how a minibatch updates the weights, and what each example did"
PAGE = Path("explain.html")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: model=… data=… batch.size=4"
    )
    parser.add_argument("--example", action="store_true", help="five weights and two examples, to follow by hand")
    parser.add_argument("--workers", type=int, default=2, help="how many the minibatch is split over (default 2)")
    parser.add_argument("--seconds", type=float, default=20.0, help="at most for measuring the noise (default 20)")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help=f"the page (default {PAGE})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there; - : print only them")


def main(parsed: argparse.Namespace) -> int:
    """Print the explanation and write the page."""
    from mbgd.building.build import typed
    from mbgd.building.composing import compose
    from mbgd.data.pictures import pictures
    from mbgd.explain.computing import Explained
    from mbgd.explain.example import OVERRIDES
    from mbgd.explain.page import write_page
    from mbgd.explain.wording import describe

    if not parsed.seconds > 0:
        raise UsageError(f"--seconds {parsed.seconds:g}; it must be > 0.")
    overrides = list(parsed.overrides)
    if parsed.example:
        overrides = [*OVERRIDES, *overrides]
    elif not any(one.startswith("batch.size=") for one in overrides):
        overrides.append("batch.size=4")  # few enough to look at each example
    explained = Explained(typed(compose(overrides)), parsed.workers, parsed.seconds)
    it = explained()
    seen = pictures(explained.examples.batch, explained.dataset, explained.size)
    write(parsed.output, lambda path: write_page(it, seen, path))
    text = json.dumps(it.values(), indent=1)
    if str(parsed.json) == "-":
        print(text)
        return 0
    print(describe(it, seen))
    if parsed.json is not None:
        write(parsed.json, lambda path: path.write_text(text + "\n"))
    print(f"\npage        {parsed.output}")
    return 0
