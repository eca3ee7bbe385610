"""Token shards to batches: which tokens the sample with a given number holds.

In: the global number of a sample since the start of training. Out: ``input_ids`` and ``targets``. The order is a pure
function of (seed, number), so it depends on no worker count, and a resumed run goes on with exactly the samples that
it had not seen.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from raylm.data.padding import padded_length
from raylm.data.samples.permutation import epoch_keys, permute
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError

IGNORED = -100
_SHIFT = 1 << 32  # purpose number of an epoch's shift, apart from the rounds of the permutation


class Samples(Protocol):
    """What training and evaluation read batches from.

    Attributes:
        count: samples in one epoch.
    """

    count: int

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by global number.

        Args:
            indices: int64 [n], each at least 0; ``index // count`` is the epoch.

        Returns:
            input_ids: int64 [n, T].
            targets: int64 [n, T]; the token after each input token, -100 where it is not counted.
            position_ids: int64 [n, T], only where documents are told apart; see :func:`document_positions`.
        """


class PackedSamples:
    """Windows of ``sequence_length`` tokens over the stream of documents.

    Let N be the tokens of the split and R = N - 1. The stream begins and ends with the end-of-text token, so its ends
    meet: positions are taken modulo R. Shuffled, an epoch has R // T windows; window w of epoch e begins at
    ``shift(seed, e) + w * T`` with the shift in [0, T), so windows differ between epochs, and sample i is window
    ``permutation(seed, e)(i % count)``. In one epoch every token but at most T - 1 is a target once. Unshuffled, there
    is no shift, sample i is window i, and a last, partial window is filled up with targets of -100, so that each of the
    R tokens after the first is a target exactly once.

    Args:
        shards: a split of kind documents.
        sequence_length: T, tokens a sample.
        seed: decides the order.
        shuffle: off for validation.
        tell_documents: give ``position_ids`` that count from each document's beginning.

    Raises:
        UserError: shuffled, and the split is shorter than one sample.
    """

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        tell_documents: bool = False,
    ) -> None:
        self._shards, self._length, self._seed, self._shuffle = shards, sequence_length, seed, shuffle
        self._tell_documents = tell_documents
        self._ring = shards.token_count - 1
        if shuffle and self._ring < sequence_length:
            raise UserError(
                f"training.sequence_length: found {sequence_length}, allowed: at most {max(self._ring, 0)}, as the "
                f"training set in {shards.directory} has {shards.token_count} tokens"
            )
        self.count = self._ring // sequence_length if shuffle else -(-self._ring // sequence_length)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See :class:`Samples`; T is ``sequence_length``."""
        positions = self._starts(indices)[:, None] + np.arange(self._length + 1)
        tokens = self._shards.take(positions % self._ring)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        if not self._shuffle:
            beyond = positions > self._ring
            inputs[beyond[:, :-1]] = self._shards.pad_id
            targets[beyond[:, 1:]] = IGNORED
        batch = {"input_ids": inputs, "targets": targets}
        if self._tell_documents:
            batch["position_ids"] = document_positions(inputs, self._shards.eos_id)
        return batch

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """The windows themselves, int64 [n, T], never padded: past the stream's end its beginning follows."""
        return self._shards.take((self._starts(indices)[:, None] + np.arange(self._length)) % self._ring)

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        """Where each sample begins in the stream, int64 [n]."""
        epochs, windows = np.divmod(np.asarray(indices, dtype=np.int64), self.count)
        if not self._shuffle:
            return windows * self._length
        shifts = (epoch_keys(self._seed, epochs, _SHIFT) % np.uint64(self._length)).astype(np.int64)
        return shifts + permute(windows, epochs, self.count, self._seed) * self._length


def document_positions(input_ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Each token's place in its document, int64 [n, T] from ``input_ids`` [n, T].

    The end-of-text token, from which a document's first token is predicted, is its place 0, as it is where the model
    writes one. Only ``prepare`` writes that token, at documents' ends. What a window begins with in the middle of a
    document counts from the window's beginning.
    """
    places = np.arange(input_ids.shape[1], dtype=np.int64)
    return places - np.maximum.accumulate(np.where(input_ids == eos_id, places, 0), axis=1)


class PairSamples:
    """A prompt/answer pair a sample, padded on the right to the longest of its batch.

    A pair that is longer than ``sequence_length`` allows loses the end of its context (of its prompt where it has no
    context), as many tokens as needed; the words around it stay. Where that is not enough the answer loses its end, and
    a pair of whose answer nothing would be left is left out. All three are counted.

    Args:
        shards: a split of kind pairs.
        sequence_length: most tokens a sample.
        seed: decides the order.
        pad_id: fills up ``input_ids``.
        answer_only: count the loss on the answer's tokens alone (its end-of-text token included).
        shuffle: off for validation.

    Attributes:
        shortened: pairs that lose tokens of context or prompt.
        answers_cut: pairs that lose tokens of the answer.
        left_out: pairs that are no sample.

    Raises:
        UserError: no pair is left.
    """

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        seed: int,
        pad_id: int,
        answer_only: bool = True,
        shuffle: bool = True,
    ) -> None:
        self._shards, self._length, self._seed = shards, sequence_length, seed
        self._pad_id, self._answer_only, self._shuffle = pad_id, answer_only, shuffle
        index = shards.index()
        starts, answers, cut_starts, cut_ends = index.T
        lengths = np.diff(starts, append=shards.token_count)
        # T inputs and their targets are T + 1 tokens.
        excess = np.maximum(lengths - (sequence_length + 1), 0)
        cuts = np.minimum(excess, cut_ends - cut_starts)
        kept = np.minimum(lengths - cuts, sequence_length + 1)
        usable = answers - cuts < kept
        self.shortened = int(np.count_nonzero(cuts[usable]))
        self.answers_cut = int(np.count_nonzero((excess > cuts)[usable]))
        self.left_out = int(np.count_nonzero(~usable))
        # Columns: first token, tokens kept, place of the answer, where the cut begins, tokens cut.
        self._pairs = np.stack([starts, kept, answers - cuts, cut_ends - cuts, cuts], axis=1)[usable]
        self.count = len(self._pairs)
        if not self.count:
            raise UserError(
                f"training.sequence_length: found {sequence_length}, which leaves no token of any answer in "
                f"{shards.directory}; allowed: {int((answers - cut_ends + cut_starts).min())} or more"
            )

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See :class:`Samples`; T is the longest pair's, rounded up to a multiple of 8, at most ``sequence_length``."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), self.count)
        if self._shuffle:
            places = permute(places, epochs, self.count, self._seed)
        starts, kept, answers, cut_at, cut = (column[:, None] for column in self._pairs[places].T)
        longest = int(kept.max(initial=2)) - 1
        width = padded_length(longest, self._length)
        columns = np.arange(width + 1)
        sources = starts + columns + np.where(columns >= cut_at, cut, 0)
        present = columns < kept
        tokens = self._shards.take(np.where(present, sources, starts))
        counted = present & (columns >= answers) if self._answer_only else present
        # The last token has nothing after it, so it is a target and never an input.
        inputs = np.where((columns < kept - 1)[:, :-1], tokens[:, :-1], self._pad_id)
        targets = np.where(counted[:, 1:], tokens[:, 1:], IGNORED)
        return {"input_ids": inputs, "targets": targets}
