"""GPT-2: a decoder with learnt positions and a norm before each half of a block."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from raylm.models.families.base import Family, Layer, Outline, Split, Step, Steps, Units
from raylm.models.families.steps import causal_mask, ends, normalize, positions_of


def _positions(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.dropout(hidden + layer.positions(positions_of(hidden)))


def _block(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.block(hidden, attention_mask=causal_mask(layer, hidden, positions_of(hidden)))


def _steps(model: PreTrainedModel) -> Steps:
    embedding, head = ends(model, "transformer.wte", "lm_head")
    positions = Step({"positions": "transformer.wpe"}, _positions, shared={"dropout": model.transformer.drop})
    shared = {"config": model.config}
    blocks = [
        Step({"block": f"transformer.h.{index}"}, _block, shared=shared) for index in range(len(model.transformer.h))
    ]
    return Steps([embedding, positions], blocks, [Step({"norm": "transformer.ln_f"}, normalize), head])


FAMILY = Family(
    model_type="gpt2",
    heads_key="n_head",
    width_key="n_embd",
    positions_key="n_positions",
    # gelu_pytorch_tanh is gelu_new (the same formula) in one fused kernel instead of eight.
    defaults={
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "activation_function": "gelu_pytorch_tanh",
    },
    plain_head=True,
    fused_matrices={"attn.c_attn.weight": 3},
    blocks={"transformer.h": "n_layer"},
    heads=Units("n_head", ("attn.c_attn",), ("attn.c_proj",)),
    neurons=Units("n_inner", ("mlp.c_fc",), ("mlp.c_proj",)),
    outline=Outline(
        splits={
            "wte": Split("vocabulary"),
            "lm_head": Split("vocabulary"),
            "attn.c_attn": Split("column", parts=3),
            "attn.c_proj": Split("row"),
            "mlp.c_fc": Split("column"),
            "mlp.c_proj": Split("row"),
        },
        divided={"GPT2Attention": ("split_size", "num_heads")},
        steps=_steps,
        shared_out={
            "n_head": lambda config: config.n_head,
            "n_inner": lambda config: config.n_inner or 4 * config.n_embd,
        },
        block_count=lambda config: config.n_layer,
    ),
)
