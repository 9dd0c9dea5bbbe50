"""One step of distributed training in plain torch: the baseline of benchmarks/startup.py.

torchrun --standalone --nproc-per-node 2 benchmarks/bare.py
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    with np.load(Path(__file__).parent.parent / "mbgd/data/digits.npz") as digits:
        inputs = torch.from_numpy(digits["inputs"].reshape(-1, 64).astype(np.float32)) / 16
        targets = torch.from_numpy(digits["targets"].astype(np.int64))
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    mine = torch.randperm(len(inputs))[:64][dist.get_rank() :: dist.get_world_size()]
    loss = F.cross_entropy(model(inputs[mine]), targets[mine])
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.4f}")
    time.sleep(0.1)  # like mbgd: otherwise torch aborts one run in four, its threads being late for Python's end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
