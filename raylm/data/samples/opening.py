"""A split of a prepared directory as samples, by what it holds."""

from __future__ import annotations

from pathlib import Path

from raylm.data.samples.conversations import ConversationSamples
from raylm.data.samples.token_samples import PackedSamples, PairSamples, Samples
from raylm.data.sources.documents import Split
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError


def open_samples(
    directory: Path | str,
    split: Split,
    sequence_length: int,
    seed: int,
    answer_only: bool = True,
    tell_documents: bool = False,
    packing: bool = True,
) -> Samples:
    """The samples of a split of a prepared directory: shuffled for train, in order for validation.

    Args:
        answer_only: of pairs and conversations count what is answered alone.
        tell_documents: give documents that are packed positions of their own.
        packing: put several conversations into a sequence.

    Raises:
        UserError: the directory is not prepared or is damaged, the split is empty, or ``sequence_length`` does not fit.
    """
    shards = TokenShards(directory, split)
    if not shards.document_count:
        raise UserError(f"{directory} has no {split} documents; prepare it with a data.{split} source")
    shuffle = split == "train"
    if shards.kind == "documents":
        return PackedSamples(shards, sequence_length, seed, shuffle, tell_documents)
    if tell_documents:
        raise UserError(
            f"objective.document_boundaries: allowed with the {shards.kind} of {directory}: ignore, as none sees "
            "another"
        )
    if shards.kind == "conversations":
        return ConversationSamples(shards, sequence_length, seed, shards.pad_id, answer_only, shuffle, packing)
    return PairSamples(shards, sequence_length, seed, shards.pad_id, answer_only, shuffle)
