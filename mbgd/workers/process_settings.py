"""torch's settings of the whole process, which a run changes."""

import os
import sys
from collections.abc import Callable

import torch

OF_INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"
"""Environment variable that torch._inductor reads when it is imported."""


def set_deterministic(mode: int) -> None:
    """`torch.set_deterministic_debug_mode`, 2: errors, which also tells torch._inductor once that is imported.

    `torch.use_deterministic_algorithms` imports it to tell it: more than a second in every process.
    """
    torch.set_deterministic_debug_mode(mode)
    os.environ[OF_INDUCTOR] = str(int(mode > 0))
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)


def remembered() -> Callable[[], None]:
    """Remember the settings; calling the result puts them back: a program may go on after its workers' work."""
    num_threads = torch.get_num_threads()
    deterministic, of_inductor = torch.get_deterministic_debug_mode(), os.environ.get(OF_INDUCTOR)
    matmul_precision = torch.get_float32_matmul_precision()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def put_back() -> None:
        torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(matmul_precision)
        set_deterministic(deterministic)
        if of_inductor is None:
            os.environ.pop(OF_INDUCTOR)
        else:
            os.environ[OF_INDUCTOR] = of_inductor
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]

    return put_back
