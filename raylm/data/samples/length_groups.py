"""Samples of about the same length in a batch, so that batches have little padding.

In: how long each sample is, the size of a batch, and the number of a sample since the start of training. Out: which row
it is. As without groups that is a pure function of (seed, number): it depends on no worker count, and a resumed run
goes on with exactly the samples that it had not seen.
"""

from __future__ import annotations

import numpy as np

from raylm.data.samples.permutation import permute

# Batches whose samples are sorted together, as in transformers' LengthGroupedSampler: longer groups have less padding,
# shorter ones more chance.
BATCHES = 50
_GROUP = 1 << 32


class LengthGroups:
    """The order of an epoch's samples, in groups that are sorted.

    The samples are shuffled. Of every :data:`BATCHES` batches the samples are sorted, the longest first, and cut into
    the batches again, which are shuffled among each other. Batches count from the start of training: one at the border
    of two epochs holds the end of a group and the beginning of another.

    Args:
        lengths: int64 [count], tokens of each row.
        batch_size: samples of a step, all workers together.
        seed: another seed is another order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._kept: tuple[tuple[int, int], int, np.ndarray] | None = None

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """The rows of the samples with these global numbers, int64 [n]."""
        found = np.empty(len(indices), dtype=np.int64)
        for place, index in enumerate(np.asarray(indices, dtype=np.int64).tolist()):
            first, rows = self._group(index)
            found[place] = rows[index - first]
        return found

    def _group(self, index: int) -> tuple[int, np.ndarray]:
        """The global number that the group of a sample begins with, and its rows in their order."""
        count, size = len(self._lengths), BATCHES * self._batch_size
        epoch, group = index // count, index // size
        # Neighbours in a batch are neighbours in a group.
        if self._kept is None or self._kept[0] != (epoch, group):
            first, stop = max(epoch * count, group * size), min((epoch + 1) * count, (group + 1) * size)
            self._kept = ((epoch, group), first, self._ordered(epoch, group, first, stop))
        return self._kept[1:]

    def _ordered(self, epoch: int, group: int, first: int, stop: int) -> np.ndarray:
        """The rows of the global numbers ``first`` to ``stop`` - 1, which one group of one epoch has."""
        places = np.arange(first, stop)
        count = len(self._lengths)
        rows = permute(places - epoch * count, np.full(len(places), epoch), count, self._seed)
        rows = rows[np.argsort(-self._lengths[rows], kind="stable")]
        # Where the batches begin; the first and the last may be parts, and stay where they are.
        begins = [first, *range(-(-(first + 1) // self._batch_size) * self._batch_size, stop, self._batch_size)]
        batches = np.split(rows, np.array(begins[1:], dtype=np.int64) - first)
        whole = [number for number, batch in enumerate(batches) if len(batch) == self._batch_size]
        if whole:
            mark = np.full(len(whole), epoch * _GROUP + group)
            moved = permute(np.arange(len(whole)), mark, len(whole), self._seed)
            sources = dict(zip(whole, (whole[place] for place in moved), strict=True))
            batches = [batches[sources.get(number, number)] for number in range(len(batches))]
        return np.concatenate(batches)
