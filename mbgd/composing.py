"""Hydra overrides → the configuration of `train.py`, for tools that take the same overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbgd import command_line
from mbgd.errors import UsageError

CONFIGURATION = Path(__file__).parent.parent / "conf" / "train.yaml"


def compose(overrides: Sequence[str]) -> Any:
    """What `python train.py OVERRIDES` would compose; UsageError where Hydra cannot."""
    from hydra import compose as composed_by_hydra
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not CONFIGURATION.is_file():
        raise UsageError(f"{CONFIGURATION} is not there: the configuration lies beside the package, in a clone of it.")
    with initialize_config_dir(str(CONFIGURATION.parent), version_base="1.3"):
        try:
            return composed_by_hydra(CONFIGURATION.stem, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error).strip().splitlines()[0]
            problem = error
    hint = command_line.hint(problem, CONFIGURATION)  # composes again, which Hydra allows one at a time
    raise UsageError(f"{reason} {hint}".strip()) from problem
