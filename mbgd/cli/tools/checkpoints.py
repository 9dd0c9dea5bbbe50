"""Lists and verifies the checkpoints of a run, and exports a model from one."""

import argparse
from pathlib import Path

from safetensors.torch import save

from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.task_state import exported_tensors, with_other_weights
from mbgd.errors import UsageError
from mbgd.files.atomic import write_atomically
from mbgd.files.reading import Unreadable
from mbgd.runs.run_folder import RunFolder
from mbgd.runs.weights import best_of
from mbgd.text.escaping import plain

DESCRIPTION = "list and verify the checkpoints of a run, or export a model from one"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write a model there, as .safetensors")
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights (docs/weights.md)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the step to export; the newest whole checkpoint if left out")
    which.add_argument("--best", action="store_true", help="export the best by the run's checkpoint.best")


def main(parsed: argparse.Namespace) -> int:
    """Print a line for each; returns 0 if all are whole, 1 if one is broken."""
    folder = RunFolder(parsed.run)
    problems = {path: checkpoint.verify(path) for path in checkpoint.complete(folder.checkpoints_path)}
    if not problems:
        raise UsageError(f"{parsed.run} holds no checkpoints. Name the folder of a run, which train.py prints.")
    best = _best(folder)
    if parsed.export is not None:
        return _export(_choose(problems, parsed, best), parsed.export, ema=parsed.ema)
    for path, problem in problems.items():
        size = sum(file.lstat().st_size for file in path.iterdir()) if path.is_dir() else 0
        line = f"step {checkpoint.step_of(path):>9,}  {size / 2**20:>9,.1f} MiB  {problem or 'whole'}"
        print(line + (f", the best: {plain(best[1])} {best[2]:.6g}" if best is not None and path == best[0] else ""))
    return 1 if any(problems.values()) else 0


def _best(folder: RunFolder) -> tuple[Path, str, float] | None:
    """(checkpoint, metric, its value) of the best by the run's configuration; None if it keeps none."""
    try:
        return best_of(folder.path, folder.read_config() or {})
    except Unreadable as error:
        print(f"warning: {error} The best checkpoint is not known.")
        return None


def _choose(problems: dict[Path, str | None], parsed: argparse.Namespace, best: tuple[Path, str, float] | None) -> Path:
    whole = [path for path, problem in problems.items() if problem is None]
    if parsed.best:
        if best is None:
            raise UsageError(f"{parsed.run} keeps no best checkpoint: it was not trained with checkpoint.best=METRIC.")
        whole = [path for path in whole if path == best[0]]
    elif parsed.step is not None:
        whole = [path for path in whole if checkpoint.step_of(path) == parsed.step]
    if not whole:
        which = "best" if parsed.best else f"step {parsed.step}" if parsed.step is not None else "any step"
        raise UsageError(f"there is no whole checkpoint of {which} to export.")
    return whole[0]


def _export(path: Path, target: Path, *, ema: bool) -> int:
    snapshot, _ = checkpoint.read(path)
    if "model" not in snapshot.tensors:
        raise UsageError(f"{path} holds no model.")
    if ema:
        snapshot = with_other_weights(snapshot, "ema")
    try:
        write_atomically(target, save(exported_tensors(snapshot), {"weights": "ema"} if ema else None))
    except OSError as error:
        raise UsageError(f"{plain(target)} cannot be written: {error.strerror or error}.") from error
    print(f"the {'average of the weights' if ema else 'model'} after step {snapshot.step} is in {target}")
    return 0
