"""Random numbers are keyed: in the model by (seed, step, micro-batch), in datasets by (seed, epoch, example).

Never by rank or loader process, and never by what was drawn before.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from mbgd.batches.order import mix


def key_generators(device: torch.device, *key: int) -> None:
    """Seed torch's default generators on the CPU and `device` by the key."""
    # 63 bits: for a larger seed torch throws and catches an exception inside, which costs more than all the rest.
    # torch.manual_seed would do too, but takes a hundred times as long: it visits every device.
    seed = mix(*key) >> 1
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def key_reading(key: int) -> None:
    """Seed torch (on the CPU), numpy and `random` by the key.

    key: from 0 to 2**63 − 1.
    """
    torch.default_generator.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # a seed of more than 32 bits takes numpy 8 µs instead of 1
    random.seed(key)


def has_drawn_since(key: int) -> bool:
    """Whether torch, numpy or `random` has drawn since `key_reading(key)`; seeds them by the key again."""
    draws = _next_draws()
    key_reading(key)
    return draws != _next_draws()


def _next_draws() -> tuple[float, float, float]:
    return torch.rand((), dtype=torch.float64).item(), np.random.random(), random.random()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Draws and seeds inside leave the generators of torch (on the CPU), numpy and `random` as they were.

    But numpy loses its cached second value of a pair of normal draws.
    """
    of_torch, of_numpy, of_random = torch.default_generator.get_state(), get_bit_generator(), random.getstate()
    # numpy gets another generator meanwhile: saving and restoring the state of its own takes 60 µs.
    set_bit_generator(_NUMPY_MEANWHILE)
    try:
        yield
    finally:
        torch.default_generator.set_state(of_torch)
        set_bit_generator(of_numpy)
        random.setstate(of_random)


_NUMPY_MEANWHILE = np.random.MT19937(0)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the default generators are as before: torch's (CPU and this device), numpy's and `random`'s."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
