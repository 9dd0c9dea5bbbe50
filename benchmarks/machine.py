"""The workers of a benchmark, a description of the machine, and the place of the results."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import mbgd

RESULTS = Path(__file__).parent / "results"


def describe() -> str:
    """Processor, cores and versions in one line."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


@contextmanager
def as_worker(rank: int, num_workers: int, port: int) -> Iterator[mbgd.Workers]:
    """This process as one of the workers of this host, with one thread, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with mbgd.start_workers("gloo") as workers:
        yield workers


def publish(name: str, text: str) -> None:
    """Print a result and write it under `results/`, beside what it was measured on."""
    print(text)
    (RESULTS / f"{name}.txt").write_text(f"{describe()}\n\n{text}\n")
