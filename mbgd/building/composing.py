"""Hydra overrides → the configuration of `train.py`, for tools that take the same overrides."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from mbgd.batches.loader import Data
from mbgd.building import command_line, configuration, switching
from mbgd.building.configuration import OURS
from mbgd.errors import UsageError

CONFIGURATION = OURS / "train.yaml"


def compose(overrides: Sequence[str]) -> Any:
    """The configuration that `mbgd train OVERRIDES` composes in this folder; UsageError if Hydra cannot."""
    from hydra import compose as composed_by_hydra
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not CONFIGURATION.is_file():
        raise UsageError(f"{CONFIGURATION} does not exist; install mbgd again.")
    configuration.use_folder(Path.cwd())
    switching.keys_stay_with_their_choice()
    with initialize_config_dir(str(CONFIGURATION.parent), version_base="1.3"):
        try:
            composed = composed_by_hydra(CONFIGURATION.stem, configuration.spelled_out(overrides))
            for one in switching.dropped:
                print(f"note: {one}", file=sys.stderr, flush=True)
            return composed
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error).strip().splitlines()[0]
            problem = error
    hint = command_line.hint(problem, CONFIGURATION)  # composes again, which Hydra allows one at a time
    raise UsageError(f"{reason} {hint}".strip()) from problem


def from_values(values: Mapping[str, Any]) -> Any:
    """The configuration that a run has recorded, with all references already resolved."""
    from omegaconf import OmegaConf

    data = {key: value for key, value in values.get("data", {}).items() if key in get_type_hints(Data)}
    return OmegaConf.create({**values, "data": data})
