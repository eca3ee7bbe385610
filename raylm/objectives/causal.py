"""The causal objective: predict each next token.

A batch is ``input_ids`` and ``targets``, both ``(batch, time)``; ``targets[b, t]`` is the token that follows
``input_ids[b, t]``, or -100 where nothing is to be predicted (padding, a prompt). Right padding needs no attention
mask, as causal attention never looks at it. Where ``objective.document_boundaries`` tells packed documents apart, a
batch has ``position_ids`` too, which begin again with each document.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from raylm.data.documents import Split
from raylm.data.samples import Samples, open_samples
from raylm.objectives.base import Batch, Objective

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CausalObjective(Objective):
    """Cross-entropy of each next token."""

    name: ClassVar[str] = "causal"
    head: ClassVar[str] = "causal"
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; documents are packed, of pairs the answers count (``objective.answer_only``)."""
        section = self.section
        tell_documents = section.document_boundaries != "ignore"
        return open_samples(directory, split, sequence_length, seed, section.answer_only, tell_documents)

    def inputs(self, batch: Batch, config: PretrainedConfig) -> Batch:
        """See :class:`Objective`.

        Without an attention mask, transformers takes positions that begin again for packed sequences, and makes a
        block-diagonal causal mask (``masking_utils.find_packed_sequence_indices``). With a mask, of ones, it does not.
        """
        given = super().inputs(batch, config)
        if "position_ids" in batch:
            given["position_ids"] = batch["position_ids"]
            if self.section.document_boundaries == "positions":
                given["attention_mask"] = torch.ones_like(batch["input_ids"])
        return given
