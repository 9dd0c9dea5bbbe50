"""`mbgd train …` and `train.py …`: train the configuration here, or start workers that do."""

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbgd.building import command_line, configuration, switching
from mbgd.cli import launching, telling
from mbgd.errors import UsageError
from mbgd.runs import sweeps
from mbgd.text import plain_output
from mbgd.workers.log import guard_output

FLAGS_THAT_TELL = {
    "-h",
    "--help",
    "--hydra-help",
    "--version",
    "-c",
    "--cfg",
    "-i",
    "--info",
    "-sc",
    "--shell-completion",
}
"""Hydra's options that print something and do not train."""

FLAGS_OF_SWEEPS = {"-m", "--multirun"}


def train(arguments: Sequence[str]) -> int:
    """Train; exit code 0, 1 (training failed), 2 (a mistake in the command) or 75 (stopped by a signal, state saved).

    arguments: Hydra's overrides and options, `workers=`, and the launcher's options.
    """
    plain_output.start()
    guard_output()  # after start(): it keeps the streams' settings
    launching.end_silently_at_interrupt()
    try:
        return _train(arguments)
    except UsageError as error:
        telling.tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 128 + signal.SIGINT


def _train(arguments: Sequence[str]) -> int:
    launching.program[:] = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    if "COMP_LINE" in os.environ:  # the shell asks for completions
        os.environ["COMP_LINE"] = re.sub(r"(?<=\s)workers=\S*\s", "", os.environ["COMP_LINE"])
    wanted, overrides = launching.split(arguments)
    flags = {one.split("=")[0] for one in overrides}
    is_sweep, tells = bool(FLAGS_OF_SWEEPS & flags), bool(FLAGS_THAT_TELL & flags)
    if launching.started_by_launcher():
        if is_sweep:
            raise UsageError(
                "--multirun inside torchrun would start the sweep once in every worker. Start one process that "
                "sweeps: mbgd train --multirun … (or python train.py --multirun …)"
            )
        launching.check_started(wanted)
    elif is_sweep and wanted.workers is not None:
        # A number needs no torch; a SLURM job counts the GPUs of its own nodes.
        is_final = wanted.workers.isdigit() or "hydra/launcher=slurm" in overrides
        number = wanted.workers if is_final else launching.num_workers(wanted.workers, overrides)
        overrides.append(f"hydra.launcher.nproc_per_node={number}")
    elif wanted.starts_processes and not tells:
        command_line.check_arguments(overrides)
        return launching.launch(wanted, overrides)
    else:
        os.environ[launching.COMMAND] = launching.as_given(wanted, overrides)
    configuration.use_folder(Path.cwd())
    try:
        return command_line.call(_run, configuration.OURS / f"{configuration.NAME}.yaml", overrides)
    finally:
        _show_sweep()


def _run(composed: Any) -> None:
    """One run of the composed configuration."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    try:
        command_line.check_sources(hydra.runtime.config_sources)
    except UsageError as error:  # Hydra would print its own message, too
        telling.tell(str(error))
        sys.exit(error.exit_code)
    if os.environ.get("RANK", "0") == "0":
        for one in (*configuration.which_wins(hydra), *switching.dropped):
            print(f"note: {one}", file=sys.stderr, flush=True)
    from mbgd.cli.run import run_or_explain

    run_or_explain(composed, hydra.runtime.choices)


def _show_sweep() -> None:
    for folder in sweeps.to_show:
        from mbgd.cli.tools.sweep import show

        show(folder)
