"""What a benchmark's result says of the machine, and where the results go."""

import os
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> str:
    """Processor, cores and versions in one line."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def publish(name: str, text: str) -> None:
    """Print a result and write it under `results/`, beside what it was measured on."""
    print(text)
    (RESULTS / f"{name}.txt").write_text(f"{describe()}\n\n{text}\n")
