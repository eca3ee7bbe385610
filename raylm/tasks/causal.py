"""The causal objective: predict each next token.

A batch is ``input_ids`` and ``targets``, both ``(batch, time)``; ``targets[b, t]`` is the token that follows
``input_ids[b, t]``, or -100 where nothing is to be predicted (padding, a prompt). Right padding needs no attention
mask, as causal attention never looks at it. Where ``objective.document_boundaries`` tells packed documents apart, and
of conversations, a batch has ``position_ids`` too, which begin again with each of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from raylm.config.model import ObjectiveSection
from raylm.data.samples.opening import open_samples
from raylm.data.samples.token_samples import IGNORED, PackedSamples, Samples
from raylm.data.sources.documents import Split
from raylm.models.heads import CAUSAL, Head
from raylm.tasks.base import GENERATION, Task
from raylm.tasks.chunked import head_loss
from raylm.tasks.objective import Batch, Objective

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class CausalObjective(Objective):
    """Cross-entropy of each next token."""

    name: ClassVar[str] = "causal"
    head: ClassVar[Head] = CAUSAL
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    predicts_tokens: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True
    counts_text: ClassVar[bool] = True

    def __init__(self, section: ObjectiveSection | None = None) -> None:
        super().__init__(section)
        self._answers_only = False

    def samples(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> Samples:
        """See :class:`Objective`; documents and conversations are packed; of pairs and conversations the answers count
        (``objective.answer_only``)."""
        section = self.section
        tell_documents = section.document_boundaries != "ignore"
        found = open_samples(
            directory, split, sequence_length, seed, section.answer_only, tell_documents, section.packing
        )
        self._answers_only = section.answer_only and not isinstance(found, PackedSamples)
        return found

    def chunks_logits(self, config: PretrainedConfig) -> bool:
        """See :class:`Objective`."""
        return self.plain_head(config)

    def summed_loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """See :class:`Objective`; never holds all logits, and of pairs and conversations only the answers' tokens go
        through the head."""
        head = model.get_output_embeddings()
        if not self.chunks_logits(model.config) or not isinstance(head, nn.Linear):
            return super().summed_loss(model, batch)
        hidden = model.base_model(**self.inputs(batch, model.config), **self.forward_options).last_hidden_state
        targets, smoothing = batch["targets"], self.section.label_smoothing if model.training else 0.0
        if self._answers_only:
            counted = targets != IGNORED
            return head_loss(head, hidden[counted], targets[counted], smoothing)
        return head_loss(head, hidden.flatten(0, 1), targets.flatten(), smoothing)

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


TASK = Task(name="causal", head=CAUSAL, objective=CausalObjective, service=GENERATION)
