"""How busy the main worker's host and GPU are, and how much of their memory is used, by all programs together."""

import time
from contextlib import suppress
from pathlib import Path

import torch

SECONDS_BETWEEN = 1.0
"""A reading costs up to a millisecond; it is not repeated sooner than this."""
STAT, MEMINFO = Path("/proc/stat"), Path("/proc/meminfo")


class Load:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last_read = -SECONDS_BETWEEN
        self._busy, self._all = _processor_time()

    def read(self) -> dict[str, float]:
        """cpu_load and gpu_load: the share of the time, 0 to 1, since the last reading and of the last moments; bytes.

        What the system does not tell is left out: Linux tells all of it; a GPU's load needs the package nvidia-ml-py.
        """
        if time.monotonic() - self._last_read < SECONDS_BETWEEN:
            return {}
        self._last_read = time.monotonic()
        return self._of_host() | (self._of_gpu() if self._device.type == "cuda" else {})

    def _of_host(self) -> dict[str, float]:
        found = {}
        busy, total = _processor_time()
        if total > self._all:
            found["cpu_load"] = (busy - self._busy) / (total - self._all)
        self._busy, self._all = busy, total
        memory = _used_memory()
        return found if memory is None else {**found, "host_memory_bytes": memory}

    def _of_gpu(self) -> dict[str, float]:
        free, total = torch.cuda.mem_get_info(self._device)
        found: dict[str, float] = {"gpu_memory_bytes": total - free}
        with suppress(ModuleNotFoundError, RuntimeError):  # without the package, or without its driver's library
            found["gpu_load"] = torch.cuda.utilization(self._device) / 100
        return found


def _processor_time() -> tuple[int, int]:
    """(busy, all) ticks of all processors since the host was started; zeros where the system does not tell."""
    try:
        ticks = [int(value) for value in STAT.read_text().partition("\n")[0].split()[1:9]]
    except OSError:
        return 0, 0
    idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
    return sum(ticks) - idle, sum(ticks)


def _used_memory() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        kilobytes = {name: int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable")}
    except (OSError, KeyError):
        return None
    return 1024 * (kilobytes["MemTotal"] - kilobytes["MemAvailable"])
