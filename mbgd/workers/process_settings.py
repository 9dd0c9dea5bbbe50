"""torch's settings of the whole process, which a run changes."""

from collections.abc import Callable

import torch


def remembered() -> Callable[[], None]:
    """Remember the settings; calling the result puts them back: a program may go on after its workers' work."""
    num_threads = torch.get_num_threads()
    deterministic, warns_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    matmul_precision = torch.get_float32_matmul_precision()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def put_back() -> None:
        torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(matmul_precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]

    return put_back
