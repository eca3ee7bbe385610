"""Conversations to samples: several in a sequence, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raylm.data.padding import padded_length
from raylm.data.samples.permutation import permute
from raylm.data.samples.token_samples import IGNORED
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError


class ConversationSamples:
    """Conversations, packed into sequences of at most ``sequence_length`` tokens.

    One that is too long loses its end; one of which no answer would be left is left out. Both are counted. What lies in
    a sequence together follows from the lengths alone (best fit, the longest first), so that it is the same for any
    number of workers; the order of the sequences is another one in each epoch. The positions of each conversation begin
    at 0, by which models that are given no attention mask tell them apart.

    Args:
        shards: a split of kind conversations.
        sequence_length: most tokens a sample.
        seed: decides the order.
        pad_id: fills up ``input_ids``.
        answer_only: count the loss on what the assistant writes alone.
        shuffle: off for validation.
        packing: off for a conversation a sample.

    Attributes:
        shortened: conversations that lose tokens.
        left_out: conversations that are in no sample.
        conversations: those that are.

    Raises:
        UserError: none is left.
    """

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        seed: int,
        pad_id: int,
        answer_only: bool = True,
        shuffle: bool = True,
        packing: bool = True,
    ) -> None:
        self._shards, self._length, self._seed = shards, sequence_length, seed
        self._pad_id, self._answer_only, self._shuffle = pad_id, answer_only, shuffle
        starts, answers = shards.index().T
        lengths = np.diff(starts, append=shards.token_count)
        # T inputs and their targets are T + 1 tokens.
        kept = np.minimum(lengths, sequence_length + 1)
        # The first token of all is no target.
        usable = np.maximum(answers, 1) < kept
        self.shortened = int(np.count_nonzero((kept < lengths) & usable))
        self.left_out = int(np.count_nonzero(~usable))
        self.conversations = int(np.count_nonzero(usable))
        if not self.conversations:
            raise UserError(
                f"training.sequence_length: found {sequence_length}, which leaves no token of any answer in "
                f"{shards.directory}; allowed: {int(answers.min())} or more"
            )
        self._starts, self._kept = starts[usable], kept[usable]
        # The last token of a conversation has nothing after it: it is a target and never an input.
        inputs = self._kept - 1
        order, ends = packed(inputs, sequence_length) if packing else _apart(len(inputs))
        self._order, self._ends = order, ends
        self.count = len(ends)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See :class:`raylm.data.samples.token_samples.Samples`; T is the longest sample's, rounded up to a multiple of
        8, at most ``sequence_length``."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), self.count)
        if self._shuffle:
            places = permute(places, epochs, self.count, self._seed)
        rows = [self._order[self._ends[place - 1] if place else 0 : self._ends[place]] for place in places]
        width = padded_length(max(int((self._kept[row] - 1).sum()) for row in rows), self._length)
        batch = {
            "input_ids": np.full((len(rows), width), self._pad_id, dtype=np.int64),
            "targets": np.full((len(rows), width), IGNORED, dtype=np.int64),
            "position_ids": np.zeros((len(rows), width), dtype=np.int64),
        }
        for number, row in enumerate(rows):
            self._fill({name: values[number] for name, values in batch.items()}, row)
        return batch

    def _fill(self, sample: dict[str, np.ndarray], conversations: np.ndarray) -> None:
        """Write conversations one after the other into a sample's arrays, [T] each."""
        place = 0
        for number in conversations:
            start, kept = int(self._starts[number]), int(self._kept[number])
            tokens = self._shards.read(start, start + kept)
            targets = tokens[1:]
            if self._answer_only:
                counted = self._shards.counted(np.arange(start + 1, start + kept))
                targets = np.where(counted, targets, IGNORED)
            here = slice(place, place + kept - 1)
            sample["input_ids"][here], sample["targets"][here] = tokens[:-1], targets
            sample["position_ids"][here] = np.arange(kept - 1)
            place += kept - 1
        # Padding counts on, as a document of its own, and no target is in it.
        sample["position_ids"][place:] = np.arange(len(sample["position_ids"]) - place)


def packed(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Which items lie together in bins of a ``capacity``: best fit, the longest first.

    Args:
        lengths: each from 1 to ``capacity``.

    Returns:
        int64 [n], items, those of one bin next to each other and in their order; int64 [bins], where each bin ends. A
        bin stands where its first item does.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    bins: list[list[int]] = []
    # By room that is left: the bins, and a bit for each room that any of them has.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    ordered = sorted(sorted(items) for items in bins)
    order = np.array([item for items in ordered for item in items], dtype=np.int64)
    return order, np.cumsum([len(items) for items in ordered])


def _apart(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each item in a bin of its own."""
    numbers = np.arange(count, dtype=np.int64)
    return numbers, numbers + 1
