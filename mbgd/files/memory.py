"""The memory that this host can still give out."""

import re
import sys
from pathlib import Path


def available_bytes() -> int | None:
    """By the kernel's estimate; None where it gives none.

    To be asked before much is allocated: Linux gives out memory that it lacks, and then kills processes.
    """
    if sys.platform != "linux":
        return None
    found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
