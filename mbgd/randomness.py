"""Randomness inside the model is keyed by (seed, step, micro-batch), never by rank or by what ran before."""

import torch

from mbgd.order import mix


def key_generators(device: torch.device, *key: int) -> None:
    """Make what torch's default generators draw next on CPU and `device` a function of the key alone."""
    seed = mix(*key)
    # torch.manual_seed would do, at a hundred times the price: it visits every kind of device.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
