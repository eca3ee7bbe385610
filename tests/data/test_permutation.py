from __future__ import annotations

import numpy as np
import pytest

from raylm.data.samples.permutation import permute


def order(count: int, epoch: int, seed: int) -> np.ndarray:
    return permute(np.arange(count), np.full(count, epoch), count, seed)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097, 100_003])
@pytest.mark.parametrize("seed", [0, 1, 2**63, -5])
def test_is_a_bijection(count: int, seed: int):
    for epoch in (0, 1, 7):
        assert np.array_equal(np.sort(order(count, epoch, seed)), np.arange(count))


def test_differs_between_epochs_and_seeds_and_from_the_identity():
    orders = [order(1000, epoch, seed) for epoch in (0, 1) for seed in (0, 1)]
    for number, first in enumerate(orders):
        assert np.mean(first == np.arange(1000)) < 0.01
        for second in orders[number + 1 :]:
            assert np.mean(first == second) < 0.01


def test_each_position_is_computed_on_its_own():
    whole = order(1000, 3, 9)
    for position in (0, 1, 500, 999):
        assert permute(np.array([position]), np.array([3]), 1000, 9) == whole[position]
    mixed = permute(np.array([5, 5]), np.array([0, 3]), 1000, 9)
    assert mixed.tolist() == [order(1000, 0, 9)[5], whole[5]]


def test_spreads_evenly():
    # Over 2,000 epochs each of 10 places is taken about 200 times by position 0: chi-square with 9 degrees of freedom.
    epochs = np.arange(2000)
    places = permute(np.zeros(2000, dtype=np.int64), epochs, 10, 0)
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_is_the_same_forever():
    # A checkpoint of an earlier version must resume in the same order.
    assert order(10, 0, 0).tolist() == [8, 4, 6, 3, 9, 1, 0, 2, 5, 7]
