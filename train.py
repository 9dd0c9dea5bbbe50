"""Train what the configuration in conf/ describes: `python train.py`, or under torchrun with more workers."""

import os
import sys

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import record

from mbgd import saving
from mbgd.build import build_trainer, typed
from mbgd.config import identity
from mbgd.errors import Preempted, UsageError, WorkersLost
from mbgd.preemption import EXIT_CODE, StopOnSignal
from mbgd.resume import resume
from mbgd.run_folder import open_run_folder
from mbgd.tracking import NoTracker, Tracker, console, told_of_its_end
from mbgd.tracking.opening import check_installed, open_trackers
from mbgd.workers import start_workers


def run(composed: DictConfig) -> None:
    """Compose → workers → build → fit → results."""
    config = typed(composed)
    check_installed(config.tracking)
    with start_workers(config.backend.name.value, config.backend.timeout_seconds) as workers:
        trainer = build_trainer(config, workers)
        folder = open_run_folder(config.run, workers, may_hold_a_run=config.resume != "never")
        text = OmegaConf.to_yaml(composed, resolve=True)
        plain = yaml.safe_load(text)
        if not resume(trainer, folder, config, plain):
            if workers.is_main:
                print(f"{folder.path} holds this run already, complete; give another run.dir for a new one.")
            return
        tracker: Tracker = NoTracker()
        checkpoints = saving.create(config.checkpoint, folder.path, folder.checkpoints_path, identity(plain), workers)
        if workers.is_main:
            folder.write_config(text)
            tracker = open_trackers(config, folder, trainer)
        with told_of_its_end(tracker):
            result = trainer.fit(tracker, checkpoints, StopOnSignal(workers))
            if workers.is_main:
                folder.write_results(result, trainer)
        if workers.is_main and not config.tracking.quiet:
            print(console.describe_end(result, folder.path))


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@record
def main(composed: DictConfig) -> None:
    try:
        run(composed)
    except (UsageError, WorkersLost) as error:
        rank = os.environ.get("RANK")
        sys.exit(f"error{f' on worker {rank}' if rank else ''}: {error}")
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on from there if it names the run (run.dir or run.id)", flush=True)
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    if "RANK" in os.environ and {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.exit(
            "error: --multirun inside torchrun would start the sweep once in every worker. Start one process that "
            "sweeps: python train.py --multirun …"
        )
    main()
