"""Steps, and parts of steps, that several families take."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from raylm.models.families.base import Layer, Step


def embed(layer: Layer, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [n, T] to hidden states [n, T, width] by the step's ``embedding``."""
    return layer.embedding(ids)


def read_out_tied(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states to logits by the weight of the step's ``embedding``."""
    return functional.linear(layer.copy_to_parts(hidden), layer.embedding.weight)


def read_out(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states to logits by the step's ``head``, a module."""
    return layer.head(hidden)


def normalize(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states through the step's ``norm``."""
    return layer.norm(hidden)


def ends(model: PreTrainedModel, embedding: str, head: str) -> tuple[Step, Step]:
    """The steps of the embedding and of the head, which may share a weight."""
    if model.get_submodule(embedding).weight is model.get_submodule(head).weight:
        modules = {"embedding": embedding}
        return Step(modules, embed, "embedding.weight"), Step(modules, read_out_tied, "embedding.weight")
    return Step({"embedding": embedding}, embed), Step({"head": head}, read_out)


def positions_of(hidden: torch.Tensor) -> torch.Tensor:
    """Positions [1, T] of hidden states [n, T, width]."""
    return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)


def causal_mask(layer: Layer, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
    """What the model itself would make; None where the attention kernel is told that it is causal."""
    return create_causal_mask(
        config=layer.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
    )


def read_out_weight(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states to logits by the step's ``head``, a weight."""
    return functional.linear(layer.copy_to_parts(hidden), layer.head)
