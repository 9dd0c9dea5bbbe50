"""One step of distributed training in plain torch: the baseline of benchmarks/startup.py.

torchrun --standalone --nproc-per-node 2 benchmarks/bare.py
"""

import gzip
import io
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    spec = find_spec("sklearn")  # importing it would take this script longer than all the rest
    assert spec is not None
    assert spec.origin is not None
    text = gzip.decompress(Path(spec.origin).with_name("datasets").joinpath("data/digits.csv.gz").read_bytes())
    rows = torch.from_numpy(np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32))
    inputs, targets = rows[:, :-1] / 16, rows[:, -1].long()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    mine = torch.randperm(len(rows))[:64][dist.get_rank() :: dist.get_world_size()]
    loss = F.cross_entropy(model(inputs[mine]), targets[mine])
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.4f}")
    time.sleep(0.1)  # like mbgd: otherwise torch aborts one run in four, its threads being late for Python's end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
