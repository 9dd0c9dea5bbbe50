"""Randomness inside the model is keyed by (seed, step, micro-batch), never by rank or by what ran before."""

import torch

from mbgd.order import mix


def key_generators(device: torch.device, *key: int) -> None:
    """Make what torch's default generators draw next on CPU and `device` a function of the key alone."""
    # 63 bits: torch takes a larger seed only after throwing and catching an exception of its own, which costs
    # more than all the rest. torch.manual_seed would do too, at a hundred times the price: it visits every device.
    seed = mix(*key) >> 1
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
