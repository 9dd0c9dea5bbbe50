"""Train what the configuration in conf/ describes: `python train.py`, or under torchrun with more workers."""

import os
import sys
from pathlib import Path

from mbgd.parent import end_with_parent

end_with_parent()

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from mbgd import command_line  # noqa: E402


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    command_line.check_sources(HydraConfig.get().runtime.config_sources)
    from torch.distributed.elastic.multiprocessing.errors import record

    from mbgd.run import run_or_explain

    record(run_or_explain)(composed, HydraConfig.get().runtime.choices)


if __name__ == "__main__":
    if "RANK" in os.environ and {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.exit(
            "error: --multirun inside torchrun would start the sweep once in every worker. Start one process that "
            "sweeps: python train.py --multirun …"
        )
    command_line.call(main, Path(__file__).parent / "conf" / "train.yaml")
