"""Train what the configuration in conf/ describes: `python train.py`, or under torchrun with more workers."""

import os
import sys
from contextlib import closing

import hydra
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import record

from mbgd.build import build_trainer, typed
from mbgd.errors import UsageError
from mbgd.run_folder import open_run_folder
from mbgd.tracking import NoTracker, Tracker, Trackers, console
from mbgd.tracking.json_lines import JsonLines
from mbgd.workers import start_workers


def run(composed: DictConfig) -> None:
    """Compose → workers → build → fit → results."""
    config = typed(composed)
    with start_workers(config.backend.name.value, config.backend.timeout_seconds) as workers:
        trainer = build_trainer(config, workers)
        folder = open_run_folder(config.run, workers)
        tracker: Tracker = NoTracker()
        if workers.is_main:
            folder.write_config(OmegaConf.to_yaml(composed, resolve=True))
            print(console.describe_start(trainer), flush=True)
            tracker = Trackers([JsonLines(folder.metrics_path), console.tracker(trainer.num_steps)])
        with closing(tracker):
            result = trainer.fit(tracker)
        if workers.is_main:
            folder.write_results(result, trainer)
            print(console.describe_end(result, folder.path))


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@record
def main(composed: DictConfig) -> None:
    try:
        run(composed)
    except UsageError as error:
        rank = os.environ.get("RANK")
        sys.exit(f"error{f' on worker {rank}' if rank else ''}: {error}")


if __name__ == "__main__":
    if "RANK" in os.environ and {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.exit(
            "error: --multirun inside torchrun would start the sweep once in every worker. Start one process that "
            "sweeps: python train.py --multirun …"
        )
    main()
