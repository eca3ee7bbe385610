"""The sequence-to-sequence objective: an encoder reads one text, a decoder writes another.

Sutskever et al. 2014, "Sequence to Sequence Learning with Neural Networks"; with attention over the encoder's states,
Vaswani et al. 2017, "Attention Is All You Need". The loss is the cross-entropy of each token of the target, its end
token included, after the tokens before it (teacher forcing). Padding of a source is masked, padding of a target counts
for nothing, so that the loss of a batch does not depend on how it is cut into micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from raylm.config.data import DataSection
from raylm.config.model import ObjectiveSection
from raylm.data.samples.text_pairs import KIND, PairInput, PairSamples
from raylm.data.samples.token_samples import IGNORED, Samples
from raylm.data.sources.documents import Split
from raylm.data.tokens.shards import read_manifest
from raylm.errors import UserError
from raylm.models.encoder_decoders import decoder_start, pairs_note, source_prefix
from raylm.models.families.build import check_positions
from raylm.models.heads import SEQUENCE_TO_SEQUENCE, Head
from raylm.tasks.objective import Batch, Objective
from raylm.tasks.rows import RowReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SHORTEST = 4


def _read(data: DataSection, config: PretrainedConfig | None, section: ObjectiveSection) -> PairInput:
    prefix = section.source_prefix
    if config is not None:
        if section.target_length is not None:
            check_positions(config, section.target_length, "objective.target_length")
        # A model that is trained further goes on with what it knows.
        prefix = source_prefix(config) if prefix is None else prefix
    return PairInput(data, prefix or "", section.target_length)


class SequenceToSequenceObjective(Objective):
    """Cross-entropy of the target's tokens."""

    name: ClassVar[str] = "sequence_to_sequence"
    head: ClassVar[Head] = SEQUENCE_TO_SEQUENCE
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    smooths_labels: ClassVar[bool] = True
    groups_lengths: ClassVar[bool] = True
    rows: ClassVar[RowReader | None] = RowReader(KIND, "pairs", _read, for_new_models=True)

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; the directory is one of pairs, which have their length already."""
        return PairSamples(directory, split, seed)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, place: str) -> None:
        """See :class:`Objective`."""
        if sequence_length < SHORTEST:
            raise UserError(f"training.sequence_length: found {sequence_length}, allowed: {SHORTEST} or more")
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise UserError(
                f"model.path: {place} has no tokenizer with a padding and an end token; {self.name} needs both"
            )

    def settings(self, directory: Path | str) -> dict[str, Any]:
        """See :class:`Objective`: that the model is for pairs, and what its sources begin with."""
        return pairs_note(read_manifest(directory)["source_prefix"])

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        """See :class:`Objective`."""
        return sequence_length, self.section.target_length or sequence_length

    def example(self, sequence_length: int) -> Batch:
        """See :class:`Objective`."""
        given = super().example(sequence_length)
        return {**given, "attention_mask": torch.ones_like(given["input_ids"])}

    def inputs(self, batch: Batch, config: PretrainedConfig) -> Batch:
        """The source with its mask, and the targets one place later, after the decoder's start token."""
        decoder = batch["targets"].roll(1, dims=1)
        decoder = decoder.masked_fill(decoder == IGNORED, config.pad_token_id or 0)
        decoder[:, 0] = decoder_start(config)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": decoder,
        }

    def tokens(self, batch: Batch) -> torch.Tensor:
        """Tokens of the sources that are no padding, of the rows that count."""
        rows = (batch["targets"] != IGNORED).any(dim=1)
        return (batch["attention_mask"].sum(dim=1) * rows).sum()
