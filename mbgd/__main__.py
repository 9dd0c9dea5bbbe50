"""`python -m mbgd TOOL …`: the tools for users."""

import argparse
import sys

from mbgd import plain_output
from mbgd.errors import UsageError
from mbgd.tools import checkpoints, compare, explain, report, sweep, verify

TOOLS = {
    "checkpoints": checkpoints,
    "compare": compare,
    "explain": explain,
    "report": report,
    "sweep": sweep,
    "verify": verify,
}


def main() -> int:
    plain_output.start()
    parser = argparse.ArgumentParser(prog="python -m mbgd", description="Tools for runs of mbgd.")
    tools = parser.add_subparsers(dest="tool", metavar="TOOL", required=True)
    for name, tool in TOOLS.items():
        tool.arguments(tools.add_parser(name, help=tool.DESCRIPTION, description=tool.DESCRIPTION))
    parsed = parser.parse_args()
    try:
        exit_code: int = TOOLS[parsed.tool].main(parsed)
        return exit_code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
