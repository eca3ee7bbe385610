"""A seeded permutation of the samples of each epoch that needs no memory: a Feistel network with cycle walking.

Four or more rounds of a Feistel network over a strong mixing function are a pseudorandom permutation of 2^b values
(Luby & Rackoff 1988); walking on along its cycle until the value is below ``count`` makes it one of ``count`` values
(Black & Rogaway 2002). Every position is computed on its own, so any worker can compute any sample.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
_MASK = (1 << 64) - 1


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014): uint64 to well-mixed uint64, any shape."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def epoch_keys(seed: int, epochs: np.ndarray, purpose: int) -> np.ndarray:
    """A uint64 key for each epoch [n], independent between purposes."""
    base = np.full(epochs.shape, seed & _MASK, dtype=np.uint64)
    return mix(mix(mix(base) ^ epochs.astype(np.uint64)) ^ np.uint64(purpose))


def permute(positions: np.ndarray, epochs: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Where each position goes in its epoch's permutation of ``range(count)``.

    Args:
        positions: int64 [n], each in ``range(count)``.
        epochs: int64 [n], the epoch of each position.
        count: size of the permutation.
        seed: another seed is another sequence of permutations.

    Returns:
        int64 [n], each in ``range(count)``; a bijection within an epoch.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = np.stack([epoch_keys(seed, epochs, purpose) for purpose in range(ROUNDS)])
    result = _feistel(positions.astype(np.uint64), keys, half)
    outside = np.flatnonzero(result >= count)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[:, outside], half)
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    """One pass over values [n] of 2 * half bits with keys [ROUNDS, n]."""
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low)
    return (left << bits) | right
