"""The causal objective: predict each next token.

A batch is ``input_ids`` and ``targets``, both ``(batch, time)``; ``targets[b, t]`` is the token that follows
``input_ids[b, t]``, or :data:`IGNORED` where nothing is to be predicted (padding, a prompt). Losses are sums, so that
whoever adds them up over workers and micro-batches divides once, by the number of targets.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

IGNORED = -100


class CausalObjective(nn.Module):
    """Wraps a causal Hugging Face model so that calling it gives the summed cross-entropy in nats.

    The wrapped model is ``self.model``; right padding needs no attention mask, as causal attention never looks at it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """``input_ids`` and ``targets`` (batch, time) to a scalar: the sum over all counted targets, in fp32."""
        logits = self.logits(input_ids)
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``input_ids`` (batch, time) to logits (batch, time, vocabulary)."""
        return self.model(input_ids=input_ids, use_cache=False).logits
