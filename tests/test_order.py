"""The order of the examples: a permutation, keyed, well mixed, the same for ever."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbgd.order import Order, mix, mix_array


GOLDEN_10 = [4, 0, 9, 1, 8, 6, 5, 7, 2, 3]
GOLDEN_BILLION = [566555185, 753106538, 225391915, 438389893]
GOLDEN_MIX = 15020427595393229491


def whole(order: Order, epoch: int = 0) -> np.ndarray:
    return order.at(epoch, np.arange(order.num_examples))


def test_every_size_up_to_4096_is_a_permutation() -> None:
    for size in range(1, 4097):
        counts = np.bincount(whole(Order(size, seed=size)), minlength=size)
        assert counts.min() == counts.max() == 1, size


@pytest.mark.parametrize("size", [10**9, 2**40 + 7, 2**62])
def test_large_sizes_stay_in_range_and_never_repeat(size: int) -> None:
    positions = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    indices = Order(size, seed=3).at(1, positions)
    assert indices.min() >= 0
    assert indices.max() < size
    assert len(np.unique(indices)) == len(positions)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [whole(Order(1000, seed), epoch) for seed in range(3) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.02


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 100), st.data())
def test_any_positions_agree_with_the_whole(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    order = Order(size, seed)
    assert np.array_equal(order.at(epoch, np.arange(start, stop)), whole(order, epoch)[start:stop])


def test_without_shuffling_examples_come_as_they_lie() -> None:
    assert whole(Order(7, seed=1, shuffle=False), epoch=5).tolist() == list(range(7))


def test_a_flipped_position_bit_flips_each_index_bit_half_the_time() -> None:
    bits = 16
    order = whole(Order(2**bits, seed=9))
    positions = np.arange(2**bits)
    for flipped in range(bits):
        changes = order ^ order[positions ^ (1 << flipped)]
        for watched in range(bits):
            assert abs(((changes >> watched) & 1).mean() - 0.5) < 0.02, (flipped, watched)


def test_successive_positions_are_uncorrelated() -> None:
    order = whole(Order(100_003, seed=2)).astype(float)
    for lag in (1, 2, 3, 64, 1000):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 0.015


def test_the_first_position_lands_everywhere_alike() -> None:
    size, seeds = 37, 37 * 200
    landed = np.array([Order(size, seed).at(0, np.array([0]))[0] for seed in range(seeds)])
    chi_square = ((np.bincount(landed, minlength=size) - 200) ** 2 / 200).sum()
    assert chi_square < 75  # 36 degrees of freedom: exceeded once in 6,000 orders that are truly random


def test_golden_values_never_change() -> None:
    """A changed order would silently change every run that is resumed or repeated."""
    assert whole(Order(10, seed=0)).tolist() == GOLDEN_10
    assert Order(10**9, seed=42).at(3, np.arange(4)).tolist() == GOLDEN_BILLION
    assert mix(1, 2, 3) == GOLDEN_MIX


def test_the_same_in_another_process() -> None:
    code = "from mbgd.order import Order; import numpy as np; print(Order(50, 7).at(2, np.arange(50)).tolist())"
    environment = {"PYTHONHASHSEED": "123"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(whole(Order(50, 7), 2).tolist())


def test_mix_array_is_mix() -> None:
    values = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert mix_array(values, key=5).tolist() == [mix(5, int(value)) for value in values]


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="num_examples"):
        Order(size, seed=0)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_the_epoch_are_refused(position: int) -> None:
    with pytest.raises(ValueError, match="positions"):
        Order(10, seed=0).at(0, np.array([position]))
