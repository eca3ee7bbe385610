"""Llama: a decoder with rotary positions, gated feed-forward networks and grouped keys and values."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from raylm.models.families.base import Family, Layer, Outline, Split, Step, Steps, Units
from raylm.models.families.steps import causal_mask, ends, normalize, positions_of


def _block(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    positions = positions_of(hidden)
    return layer.block(
        hidden,
        attention_mask=causal_mask(layer, hidden, positions),
        position_ids=positions,
        position_embeddings=layer.rotary(hidden, position_ids=positions),
    )


def _steps(model: PreTrainedModel) -> Steps:
    shared = {"config": model.config, "rotary": model.model.rotary_emb}
    embedding, head = ends(model, "model.embed_tokens", "lm_head")
    blocks = [
        Step({"block": f"model.layers.{index}"}, _block, shared=shared) for index in range(len(model.model.layers))
    ]
    return Steps([embedding], blocks, [Step({"norm": "model.norm"}, normalize), head])


FAMILY = Family(
    model_type="llama",
    heads_key="num_attention_heads",
    width_key="hidden_size",
    positions_key="max_position_embeddings",
    head_width_key="head_dim",
    defaults={"attention_dropout": 0.0},
    plain_head=True,
    blocks={"model.layers": "num_hidden_layers"},
    heads=Units(
        "num_attention_heads",
        ("self_attn.q_proj",),
        ("self_attn.o_proj",),
        ("self_attn.[kv]_proj",),
        "num_key_value_heads",
        "head_dim",
    ),
    neurons=Units("intermediate_size", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    norms={
        "input_layernorm": ("self_attn.[qkv]_proj",),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    final_norm="model.norm",
    outline=Outline(
        splits={
            "embed_tokens": Split("vocabulary"),
            "lm_head": Split("vocabulary"),
            "q_proj": Split("column"),
            "k_proj": Split("column"),
            "v_proj": Split("column"),
            "o_proj": Split("row"),
            "gate_proj": Split("column"),
            "up_proj": Split("column"),
            "down_proj": Split("row"),
        },
        steps=_steps,
        shared_out={
            "num_attention_heads": lambda config: config.num_attention_heads,
            "num_key_value_heads": lambda config: config.num_key_value_heads,
            "intermediate_size": lambda config: config.intermediate_size,
        },
        block_count=lambda config: config.num_hidden_layers,
    ),
)
