"""What a run's bits depend on beside its configuration, recorded so that two runs can be compared."""

import platform
from pathlib import Path

import torch

from mbgd.checks.setup import Setup
from mbgd.workers import cuda


def conditions(setup: Setup) -> dict[str, str | int]:
    """The processor, threads and micro-batches of this run; versions are recorded separately."""
    plan, device = setup.plan, setup.workers.device
    return {
        "processor": processor(device),
        "threads_per_worker": torch.get_num_threads(),
        "compile": setup.settings.compile.value,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "num_micro_batches": plan.num_micro_batches(min(plan.minibatch_size, plan.num_examples)),
        **(cuda.conditions(device) if device.type == "cuda" else {}),
    }


def processor(device: torch.device) -> str:
    """The name of the GPU, or of the CPU and the vector instructions that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
