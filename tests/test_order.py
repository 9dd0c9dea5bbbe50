"""The order of the examples: a permutation, keyed, well mixed, the same for ever."""

import json
import os
import subprocess
import sys
from itertools import permutations, product
from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mbgd.batches.order import BLOCK_POSITIONS, Order, mix, mix_array, scramble

GOLDEN_10 = [4, 0, 9, 1, 8, 6, 5, 7, 2, 3]
GOLDEN_MIX = 15020427595393229491
GOLDEN_STARTS = [  # num_examples, seed, epoch, the first four indices
    (10**9, 42, 3, [566555185, 753106538, 225391915, 438389893]),
    (2**40 + 7, 1, 0, [782917086347, 391112240724, 706755459523, 616157261119]),
    (2**62, 2, 5, [3064430134674875998, 1840743550660605812, 1050224287839623762, 1252487773292571701]),
]


def whole(order: Order, epoch: int = 0) -> NDArray[np.int64]:
    return order.indices(epoch, 0, order.num_examples)


def bits_of(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The low bits of each number, shape (len(numbers), count)."""
    return (numbers[:, None] >> np.arange(count)) & 1


def test_every_size_up_to_4096_is_a_permutation() -> None:
    for size in range(1, 4097):
        counts = np.bincount(whole(Order(size, seed=size)), minlength=size)
        assert len(counts) == size
        assert counts.min() == counts.max() == 1, size


@pytest.mark.parametrize("size", [BLOCK_POSITIONS - 1, BLOCK_POSITIONS, BLOCK_POSITIONS + 1, 2**17 + 1])
def test_permutations_of_several_blocks(size: int) -> None:
    indices = whole(Order(size, seed=3), epoch=2)
    assert np.array_equal(np.sort(indices), np.arange(size))


@pytest.mark.parametrize("size", [10**9, 2**40 + 7, 2**61 + 1, 2**62 - 1, 2**62])
def test_large_sizes_stay_in_range_and_never_repeat(size: int) -> None:
    order = Order(size, seed=3)
    indices = np.concatenate([order.indices(1, 0, 50_000), order.indices(1, size - 50_000, size)])
    assert indices.min() >= 0
    assert indices.max() < size
    assert len(np.unique(indices)) == len(indices)
    # 100,000 uniform draws all miss a tenth of the range with probability below 1e-4000.
    assert indices.min() < size // 10
    assert indices.max() > size - size // 10


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [whole(Order(1000, seed), epoch) for seed in range(3) for epoch in range(3)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).mean() < 0.02


@given(st.integers(1, 5000), st.integers(), st.integers(0, 100), st.data())
def test_slices_agree_with_the_whole(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    cut = data.draw(st.integers(start, stop))
    order = Order(size, seed)
    expected = whole(order, epoch)[start:stop]
    parts = [order.indices(epoch, start, cut), order.indices(epoch, cut, stop)]
    assert np.array_equal(np.concatenate(parts), expected)
    assert np.array_equal(order.at(epoch, np.arange(start, stop)), expected)


def test_slices_across_blocks_agree_with_the_whole() -> None:
    order = Order(3 * BLOCK_POSITIONS + 5, seed=8)
    start, stop = BLOCK_POSITIONS - 3, 2 * BLOCK_POSITIONS + 3
    assert np.array_equal(order.indices(1, start, stop), whole(order, 1)[start:stop])


@pytest.mark.parametrize("shuffle", [True, False])
def test_positions_keep_their_shape_and_their_values(shuffle: bool) -> None:
    order = Order(100, seed=4, shuffle=shuffle)
    positions = np.array([[5, 99, 0], [5, 17, 3]])
    given_positions = positions.copy()
    indices = order.at(2, positions)
    assert np.array_equal(indices, whole(order, 2)[positions])
    assert not np.shares_memory(indices, positions)
    assert np.array_equal(positions, given_positions)
    assert np.array_equal(order.at(2, positions.T), indices.T)


def test_no_positions_give_no_indices() -> None:
    for indices in (Order(10, seed=0).indices(0, 10, 10), Order(10, seed=0).at(0, np.arange(0))):
        assert indices.shape == (0,)
        assert indices.dtype == np.int64


def test_without_shuffling_examples_come_as_they_lie() -> None:
    order = Order(7, seed=1, shuffle=False)
    assert whole(order, epoch=5).tolist() == list(range(7))
    assert order.indices(5, 2, 4).tolist() == [2, 3]


@pytest.mark.parametrize("num_bits", [15, 16])  # halves of unequal and of equal width
def test_a_flipped_position_bit_flips_each_index_bit_half_the_time(num_bits: int) -> None:
    order = whole(Order(2**num_bits, seed=9))
    positions = np.arange(2**num_bits)
    for flipped in range(num_bits):
        changed = bits_of(order ^ order[positions ^ (1 << flipped)], num_bits)
        # 2**14 pairs or more: a fair coin's standard error is at most 0.004.
        assert np.abs(changed.mean(axis=0) - 0.5).max() < 0.02, flipped
        # Avalanche: the number of changed bits is binomial, of variance num_bits / 4.
        assert changed.sum(axis=1).var() == pytest.approx(num_bits / 4, rel=0.1), flipped


@pytest.mark.parametrize("size", [2**15, 2**16, 10**9])
def test_index_bits_tell_nothing_of_position_bits(size: int) -> None:
    count = min(size, 2**16)
    indices = Order(size, seed=9).indices(0, 0, count)
    num_bits = count.bit_length() - 1
    signs_before = 1.0 - 2 * bits_of(np.arange(count), num_bits)
    signs_after = 1.0 - 2 * bits_of(indices, num_bits)
    assert np.abs(signs_before.T @ signs_after / count).max() < 5 / np.sqrt(count)


def test_successive_positions_are_uncorrelated() -> None:
    order = whole(Order(100_003, seed=2)).astype(float)
    for lag in (1, 2, 3, 64, 1000):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 0.015


def test_the_same_position_of_successive_epochs_and_seeds_is_uncorrelated() -> None:
    size = 100_003
    first = whole(Order(size, seed=2), epoch=0).astype(float)
    for other in (whole(Order(size, seed=2), epoch=1), whole(Order(size, seed=3), epoch=0)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.015


def chi_square(observed: NDArray[np.int64], expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_the_first_position_lands_everywhere_alike() -> None:
    size, seeds = 37, 37 * 200
    landed = np.array([Order(size, seed).indices(0, 0, 1)[0] for seed in range(seeds)])
    # 36 degrees of freedom: exceeded once in 6,000 orders that are truly random.
    assert chi_square(np.bincount(landed, minlength=size), 200) < 75


@pytest.mark.parametrize(("size", "limit"), [(2, 16), (3, 26), (4, 56)])  # exceeded about once in 10,000
def test_every_order_of_a_few_examples_comes_alike(size: int, limit: float) -> None:
    numbers = {order: number for number, order in enumerate(permutations(range(size)))}
    seeds = 100 * factorial(size)
    seen = np.array([numbers[tuple(whole(Order(size, seed)).tolist())] for seed in range(seeds)])
    assert chi_square(np.bincount(seen, minlength=len(numbers)), 100) < limit


def test_golden_orders_never_change() -> None:
    """A changed order would silently change every run that is resumed or repeated."""
    assert whole(Order(10, seed=0)).tolist() == GOLDEN_10
    for size, seed, epoch, indices in GOLDEN_STARTS:
        assert Order(size, seed).indices(epoch, 0, 4).tolist() == indices


def test_golden_mix_never_changes() -> None:
    assert mix(1, 2, 3) == GOLDEN_MIX
    assert mix(-1) == 16490336266968443936
    # The first outputs of splitmix64 from state 0, from the authors' reference code (Vigna, splitmix64.c).
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_the_same_in_another_process() -> None:
    code = "from mbgd.batches.order import *; print([Order(50, 7).indices(2, 0, 50).tolist(), mix(7, -2, 2**70)])"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    printed = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert json.loads(printed) == [whole(Order(50, 7), 2).tolist(), mix(7, -2, 2**70)]


def test_mix_minds_the_order_and_the_number_of_values() -> None:
    keys = [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (-1,), (2**63,)]
    assert len({mix(*key) for key in keys}) == len(keys)


@given(st.lists(st.integers()))
def test_mix_takes_any_ints_modulo_2_to_the_64(values: list[int]) -> None:
    mixed = mix(*values)
    assert 0 <= mixed < 2**64
    assert mixed == mix(*(value % 2**64 for value in values))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_bit_of_a_key_flips_each_bit_of_mix_half_the_time(place: int) -> None:
    """Dropout is keyed by (seed, step, micro-batch), all small numbers that differ in few bits."""
    keys = list(product(range(10), range(20), range(10)))
    mixed = np.array([mix(*key) for key in keys], dtype=np.uint64)
    for flipped in (0, 1, 5, 31, 63):
        others = [tuple(v ^ (1 << flipped) if at == place else v for at, v in enumerate(key)) for key in keys]
        changed = mixed ^ np.array([mix(*key) for key in others], dtype=np.uint64)
        rates = np.unpackbits(changed.view(np.uint8).reshape(len(keys), 8), axis=1).mean(axis=0)
        # 1,000 pairs of their own at least: a fair coin's standard error is at most 0.016.
        assert np.abs(rates - 0.5).max() < 0.08, flipped


def test_the_low_32_bits_of_mix_hardly_ever_meet() -> None:
    keys = list(product([3], range(2500), range(8)))
    low = {mix(*key) & 0xFFFFFFFF for key in keys}
    assert len(keys) - len(low) <= 3  # of 20,000 random 32-bit numbers 0.05 pairs meet


def test_mix_array_is_mix() -> None:
    values = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert mix_array(values, key=5).tolist() == [mix(5, int(value)) for value in values]
    assert values.tolist() == [0, 1, 2**63, 2**64 - 1]


def test_scramble_works_in_place_with_and_without_scratch() -> None:
    words = np.arange(5, dtype=np.uint64)
    others = words.copy()
    assert scramble(words) is words
    assert np.array_equal(words, scramble(others, scratch=np.empty_like(others)))


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"num_examples={size}; an order needs from 1"):
        Order(size, seed=0)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_the_epoch_are_refused(position: int, shuffle: bool) -> None:
    with pytest.raises(ValueError, match=f"positions {position} to {position}; an epoch has positions 0"):
        Order(10, seed=0, shuffle=shuffle).at(0, np.array([position]))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 11), (6, 5), (11, 11)])
def test_slices_outside_the_epoch_are_refused(start: int, stop: int, shuffle: bool) -> None:
    with pytest.raises(ValueError, match=rf"positions \[{start}, {stop}\) of 10 examples; the rule is"):
        Order(10, seed=0, shuffle=shuffle).indices(0, start, stop)
