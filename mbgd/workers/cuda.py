"""CUDA's settings: set before CUDA starts, made deterministic for reproducible runs, recorded. See docs/gpu.md."""

import os

import torch

from mbgd.errors import UsageError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""The settings with which cuBLAS is deterministic."""


def set_up() -> None:
    """Call before CUDA starts in this process; the user's own setting stays."""
    os.environ.setdefault(WORKSPACE, DETERMINISTIC_WORKSPACES[0])


def make_deterministic() -> None:
    """Make the same computation on the same GPU give the same bits; UsageError if CUDA started with other settings."""
    workspace = os.environ.get(WORKSPACE)
    if workspace is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UsageError(
            f"averaging=reproducible on a GPU, but CUDA has started without {WORKSPACE}. Set it to "
            f"{DETERMINISTIC_WORKSPACES[0]} before CUDA starts, as mbgd.start_workers() does."
        )
    if workspace is not None and workspace not in DETERMINISTIC_WORKSPACES:
        raise UsageError(
            f"averaging=reproducible on a GPU with {WORKSPACE}={workspace}; cuBLAS gives the same bits only with "
            f"{' or '.join(DETERMINISTIC_WORKSPACES)}. Set one of them, or leave it out."
        )
    set_up()
    torch.backends.cudnn.benchmark = False  # it may choose other kernels in another run
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def conditions(device: torch.device) -> dict[str, str]:
    """Versions and settings that a run's bits depend on, beside the GPU's name."""
    return {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "fp32_matmul": torch.backends.cuda.matmul.fp32_precision,
        "fp32_convolution": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "cudnn_benchmark": str(torch.backends.cudnn.benchmark),
        "cublas_workspace": os.environ.get(WORKSPACE, "torch's own"),
    }
