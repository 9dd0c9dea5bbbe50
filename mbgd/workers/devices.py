"""Which device and backend a worker has."""

import torch

from mbgd.errors import UsageError
from mbgd.workers import cuda


def own_device(backend: str, device: str, local_rank: int, local_num_workers: int) -> tuple[str, torch.device]:
    """The backend and this worker's device."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, device = choose_backend(backend, device, num_gpus=num_gpus, local_num_workers=local_num_workers)
    if device != "cuda":
        return backend, torch.device("cpu")
    own = torch.device("cuda", local_rank % num_gpus)
    cuda.set_up()
    torch.cuda.set_device(own)
    return backend, own


def choose_backend(backend: str, device: str, *, num_gpus: int, local_num_workers: int) -> tuple[str, str]:
    """(gloo or nccl, cpu or cuda); UsageError if the choice cannot work on this host.

    num_gpus, local_num_workers: on this host.
    """
    if backend == "nccl" and device == "cpu":
        raise UsageError("backend=nccl with backend.device=cpu; nccl is for GPUs. Use backend=gloo for CPU workers.")
    if num_gpus == 0 and (backend == "nccl" or device == "cuda"):
        asked = "backend=nccl" if backend == "nccl" else "backend.device=cuda"
        remedy = "Use backend=gloo" if device == "auto" else "Use backend=gloo backend.device=cpu"
        raise UsageError(f"{asked}, but torch sees no GPU on this host. {remedy} for CPU workers.")
    if backend == "nccl" and local_num_workers > num_gpus:
        raise UsageError(
            f"{local_num_workers} workers on this host, but only {num_gpus} GPUs; each worker needs its own GPU. "
            f"Use --nproc-per-node {num_gpus}, backend=gloo for CPU workers, or backend=gloo backend.device=cuda for "
            "workers that share a GPU."
        )
    if backend == "auto":
        backend = "nccl" if num_gpus >= local_num_workers and device != "cpu" else "gloo"
    if device == "auto":
        device = "cuda" if backend == "nccl" else "cpu"
    return backend, device
