"""Train what the configuration in conf/ describes: `python train.py`, or under torchrun with more workers."""

import os
import sys
from contextlib import closing
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mbgd import command_line
from mbgd.errors import Preempted, UsageError, WorkersLost


def run(composed: DictConfig) -> None:
    """Compose → workers → build → fit → results."""
    # torch takes seconds to import, which --help, tab completion and the parent of a sweep do not need to wait for.
    from mbgd import saving
    from mbgd.build import build_trainer, run_name, typed
    from mbgd.config import identity
    from mbgd.preemption import StopOnSignal
    from mbgd.resume import resume
    from mbgd.run_folder import open_run_folder
    from mbgd.tracking import NoTracker, Tracker, Trackers, console
    from mbgd.tracking.json_lines import JsonLines
    from mbgd.worker_log import start_log
    from mbgd.workers import start_workers

    config = typed(composed)
    with start_workers(config.backend.name.value, config.backend.timeout_seconds) as workers:
        trainer = build_trainer(config, workers)
        name = run_name(config.run, HydraConfig.get().runtime.choices)
        folder = open_run_folder(config.run, name, workers, may_hold_a_run=config.resume != "never")
        start_log(folder.log_path(workers.rank), workers.rank, workers.num_workers)
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
            print(console.describe_start(trainer), flush=True)
            tracker = Trackers([JsonLines(folder.metrics_path), console.tracker(trainer.num_steps)])
        with closing(tracker):
            result = trainer.fit(tracker, checkpoints, StopOnSignal(workers))
        if workers.is_main:
            folder.write_results(result, trainer)
            print(console.describe_end(result, folder.path))


def run_or_explain(composed: DictConfig) -> None:
    """`run`, with mistakes of the user's and preemption told in a line."""
    try:
        run(composed)
    except (UsageError, WorkersLost) as error:
        rank = os.environ.get("RANK")
        sys.exit(f"error{f' on worker {rank}' if rank else ''}: {error}")
    except Preempted as stopped:
        from mbgd.preemption import EXIT_CODE

        print(f"{stopped}; the same command goes on from there if it names the run (run.dir or run.id)", flush=True)
        sys.exit(EXIT_CODE)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    record(run_or_explain)(composed)


if __name__ == "__main__":
    if "RANK" in os.environ and {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.exit(
            "error: --multirun inside torchrun would start the sweep once in every worker. Start one process that "
            "sweeps: python train.py --multirun …"
        )
    command_line.call(main, Path(__file__).parent / "conf" / "train.yaml")
