"""Random numbers that are a pure function of (seed, sample, place): for masks that no number of workers changes."""

from __future__ import annotations

import numpy as np

from raylm.data.samples.permutation import epoch_keys, mix

# Purpose numbers are apart from those of the order of samples.
_FIRST_PURPOSE = 1 << 33


def draw(seed: int, indices: np.ndarray, width: int, purpose: int) -> np.ndarray:
    """Uniform numbers for the samples ``indices`` [n], uint64 [n, width], independent between purposes."""
    keys = epoch_keys(seed, np.asarray(indices, dtype=np.int64), _FIRST_PURPOSE + purpose)
    return mix(mix(keys)[:, None] ^ np.arange(width, dtype=np.uint64))


def choose(numbers: np.ndarray, count: int) -> np.ndarray:
    """``count`` places of each row of :func:`draw`'s ``numbers`` [n, width], every choice alike; bool [n, width]."""
    chosen = np.zeros(numbers.shape, dtype=bool)
    if count:
        places = np.argpartition(numbers, count - 1, axis=1)[:, :count] if count < numbers.shape[1] else None
        if places is None:
            chosen[:] = True
        else:
            np.put_along_axis(chosen, places, True, axis=1)
    return chosen
