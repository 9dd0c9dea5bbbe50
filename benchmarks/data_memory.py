"""Memory of the data on a host, by number of workers: `python benchmarks/data_memory.py [--mib N] [--workers N ...]`.

Memory of a host: the sum of its workers' proportional set sizes (Pss in /proc/PID/smaps_rollup), in which a page that
n processes map counts 1/n for each. The data's part is the peak over a run, less that of the same run with few
examples, enough for batches of the same size.
"""

import argparse
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

import mbgd
from mbgd.data import InMemory, tensors

from machine import as_worker, publish

VALUES = 1024
FEW = 8192
MINIBATCH = 1024
SECONDS_BETWEEN_LOOKS = 0.05


def own_copy(path: str, split: str) -> InMemory:
    """As in a program that loads the file on every worker."""
    prefix = "eval_" if split == "evaluation" else ""
    with np.load(path) as arrays:
        return InMemory(*(torch.from_numpy(arrays[f"{prefix}{name}"]) for name in ("inputs", "targets")))


KINDS: dict[str, tuple[str, Callable[[str, str], InMemory | None]]] = {
    "own copies, of .npz": ("data.npz", own_copy),
    "data=tensors, .npz": ("data.npz", tensors),
    "data=tensors, .safetensors": ("data.safetensors", tensors),
    "data=tensors, .npy": ("folder", tensors),
}


def write(folder: Path, num_examples: int) -> int:
    """The same examples in every format; returns their bytes."""
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for prefix, size in (("", num_examples), ("eval_", num_examples // 8)):
        arrays[f"{prefix}inputs"] = generator.normal(size=(size, VALUES)).astype(np.float32)
        arrays[f"{prefix}targets"] = generator.integers(0, 10, size)
    np.savez(folder / "data.npz", **arrays)
    save_file(arrays, folder / "data.safetensors")
    (folder / "folder").mkdir()
    for name, array in arrays.items():
        np.save(folder / "folder" / f"{name}.npy", array)
    return sum(array.nbytes for array in arrays.values())


def train(rank: int, num_workers: int, port: int, kind: str, folder: str) -> None:
    with as_worker(rank, num_workers, port) as workers:
        name, read = KINDS[kind]
        torch.manual_seed(0)
        model = torch.nn.Linear(VALUES, 10)
        data = mbgd.Data(train=read(f"{folder}/{name}", "train"), evaluation=read(f"{folder}/{name}", "evaluation"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        settings = mbgd.Settings(epochs=1, batch=mbgd.Batch(size=MINIBATCH))
        mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, workers).fit()


def pss(process: BaseProcess) -> int:
    """Bytes."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def peak(num_workers: int, port: int, kind: str, folder: str) -> int:
    context = multiprocessing.get_context("forkserver")
    ranks = range(num_workers)
    processes = [context.Process(target=train, args=(rank, num_workers, port, kind, folder)) for rank in ranks]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, sum(map(pss, processes)))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a worker ended with exit code {process.exitcode}")
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 4))
    arguments = parser.parse_args()
    # So that a worker starts in a tenth of a second.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "mbgd.trainer", "mbgd.data"])
    ports = itertools.count(20000 + os.getpid() % 20000)
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        few_bytes = write(Path(few), FEW)
        num_bytes = write(Path(many), arguments.mib * 2**20 // (4 * VALUES))
        lines = [
            f"Peak memory of {num_bytes / 2**20:,.0f} MiB of data on a host, as a multiple of the data: the sum of the",
            "workers' proportional set sizes over a run of one epoch and an evaluation, less that of the same run with",
            f"{FEW:,} examples.",
            "Own copies: every worker loads the file with numpy.load.",
            "",
            f"{'workers':28}" + "".join(f"{number:>8}" for number in arguments.workers),
        ]
        for kind in KINDS:
            row = f"{kind:28}"
            for number in arguments.workers:
                peaks = [peak(number, next(ports), kind, folder) for folder in (many, few)]
                of_data = peaks[0] - peaks[1]
                row += f"{of_data / (num_bytes - few_bytes):8.2f}"
            lines.append(row)
            print(row, flush=True)
    publish("data_memory", "\n".join(lines))


if __name__ == "__main__":
    main()
