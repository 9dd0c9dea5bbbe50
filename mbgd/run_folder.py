"""A run's folder: what the main worker leaves on disk."""

import json
import os
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mbgd.conditions import conditions
from mbgd.config import Run
from mbgd.errors import UsageError
from mbgd.fingerprint import weights_sha256
from mbgd.trainer import Result, Trainer
from mbgd.workers import Workers


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `summary.json` and `model.safetensors` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_config(self, yaml: str) -> None:
        write_atomically(self.path / "config.yaml", yaml.encode())

    def write_results(self, result: Result, trainer: Trainer) -> None:
        """Export the model and write the summary, which is there only once the run is complete."""
        model, plan = trainer.model, trainer.plan
        write_atomically(self.path / "model.safetensors", save(exported(model)))
        summary = {
            "metrics": result.metrics,
            "weights_sha256": weights_sha256(model),
            "steps": result.steps,
            "examples_seen": result.examples_seen,
            "examples_per_second": result.examples_per_second,
            "skipped_steps": result.num_skipped_steps,
            "num_workers": plan.num_workers,
            "num_micro_batches": plan.num_micro_batches(min(plan.minibatch_size, plan.num_examples)),
            "conditions": conditions(plan, trainer.workers.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_atomically(self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def open_run_folder(run: Run, workers: Workers) -> RunFolder:
    """The run's folder, made by the main worker and the same on every worker; UsageError on all if it can't be."""
    path, problem = "", ""
    if workers.is_main:
        folder = Path(run.dir) if run.dir is not None else Path(run.root) / (run.id or new_run_id(run))
        path, problem = str(folder), _make(folder)
    path, problem = workers.broadcast((path, problem))
    if problem:
        raise UsageError(problem)
    return RunFolder(Path(path))


def _make(folder: Path) -> str:
    """Make the folder; what hinders, or nothing."""
    if (folder / "metrics.jsonl").exists():
        return f"run.dir={folder} already holds a run. Give another run.dir, or delete that folder."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        return f"run.dir={folder} cannot be written: {error.strerror}. Give a folder that you may write to."
    return ""


def new_run_id(run: Run) -> str:
    """A readable name: when the run began, and a short id that all workers and restarts of one torchrun share."""
    torchrun_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    short = os.urandom(4).hex() if torchrun_id == "none" else torchrun_id[:8]
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{short}"


def exported(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under their own names, on the CPU; tied parameters under each of their names."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def write_atomically(path: Path, content: bytes) -> None:
    """The file holds the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
