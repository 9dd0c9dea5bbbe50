"""The commands of `mbgd`. Tools import what they need only when they run."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from mbgd.errors import UsageError
from mbgd.text import plain_output
from mbgd.text.suggestions import did_you_mean

TOOLS = ("checkpoints", "compare", "explain", "launch", "report", "status", "sweep", "verify")
"""Modules of mbgd.cli.tools."""

ON_WORKERS = ("evaluate", "predict")
"""Those that run on workers, started as those of `train` are."""

TRAIN = "train what the configuration describes: mbgd train workers=2 model=cnn batch.size=128"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. arguments: by default those of this process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        from mbgd.cli.train import train

        return train(arguments[1:])
    if arguments and arguments[0] in ON_WORKERS:
        from mbgd.cli.on_workers import run

        return run(arguments[0], arguments[1:])
    plain_output.start()
    modules = {"new": "mbgd.cli.new", "completion": "mbgd.cli.completion"}
    modules |= {name: f"mbgd.cli.tools.{name}" for name in (*TOOLS, *ON_WORKERS)}
    given = next((one for one in arguments if not one.startswith("-")), None)
    if given is not None and given not in modules:
        meant = did_you_mean(given, ["train", *modules])
        print(f"error: mbgd has no command {given}.{meant} `mbgd --help` shows them.", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog="mbgd", description="Exact distributed data-parallel training for PyTorch.")
    parser.add_argument("--version", action="version", version=_version() if "--version" in arguments else "")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("train", help=TRAIN)
    for name, module in modules.items():
        command = import_module(module)
        command.arguments(commands.add_parser(name, help=command.DESCRIPTION, description=command.DESCRIPTION))
    end = arguments.index("--") if given == "launch" and "--" in arguments else len(arguments)
    parsed = parser.parse_args(arguments[:end])
    parsed.of_train = list(arguments[end + 1 :])
    try:
        exit_code: int = import_module(modules[parsed.command]).main(parsed)
        return exit_code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _version() -> str:
    from mbgd.versions import of_mbgd, of_torch

    return f"mbgd {of_mbgd()}, torch {of_torch()}"
