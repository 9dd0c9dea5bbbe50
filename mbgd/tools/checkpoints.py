"""The checkpoints of a run: which there are, whether they are whole, and a model out of one."""

import argparse
from pathlib import Path

from safetensors.torch import save

from mbgd import checkpoint
from mbgd.errors import UsageError
from mbgd.run_folder import write_atomically

DESCRIPTION = "list and verify the checkpoints of a run, or export a model from one"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write a model there, as .safetensors")
    parser.add_argument("--step", type=int, help="the step to export; the newest whole checkpoint if left out")


def main(parsed: argparse.Namespace) -> int:
    """Print a line for each; 0 if all are whole, 1 if one is broken."""
    paths = checkpoint.complete(parsed.run / "checkpoints")
    if not paths:
        raise UsageError(f"{parsed.run} holds no checkpoints. Name the folder of a run, which train.py prints.")
    problems = {path: checkpoint.verify(path) for path in paths}
    if parsed.export is not None:
        return _export(problems, parsed.step, parsed.export)
    for path, problem in problems.items():
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"step {int(path.name[5:]):>9,}  {size / 2**20:>9,.1f} MiB  {problem or 'whole'}")
    return 1 if any(problems.values()) else 0


def _export(problems: dict[Path, str | None], step: int | None, target: Path) -> int:
    wanted = [path for path, problem in problems.items() if step in (None, int(path.name[5:])) and problem is None]
    if not wanted:
        raise UsageError(f"there is no whole checkpoint{'' if step is None else f' of step {step}'} to export.")
    snapshot, _ = checkpoint.read(wanted[0])
    write_atomically(target, save(dict(snapshot.tensors["model"])))
    print(f"the model after step {snapshot.step} is in {target}")
    return 0
