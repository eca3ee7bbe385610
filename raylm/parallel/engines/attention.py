"""Attention of a model that trains in bf16 on a CPU: its scores in fp32.

torch's fused attention for CPUs is slower in bf16 than in fp32, backward above all: in a GPT-2 of 10 million parameters
it took half of a step that fp32 attention makes a quarter shorter. The other matrix products stay in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa_fp32"


def attend_in_fp32(model: PreTrainedModel) -> None:
    """Have ``model`` compute scaled dot-product attention in fp32; families with an attention of their own keep it.

    Its configuration says so from then on, but not the ``config.json`` that is written from it.
    """
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    outputs, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return outputs.to(query.dtype), None
