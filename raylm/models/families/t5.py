"""T5: an encoder and a decoder with relative positions."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from raylm.models.families.base import Family, Layer, Outline, Split, Step, Steps, Units
from raylm.models.families.steps import causal_mask, ends, positions_of

# Between T5's steps pass (text, target, position bias of the attention in this stack; none before its first block).


def _embed(layer: Layer, ids: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(layer.embedding(part) for part in ids)


def _dropout(layer: Layer, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(layer.dropout(part) for part in values)


def _encoder_block(layer: Layer, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    text, target, *bias = values
    text, bias = layer.block(text, position_bias=bias[0] if bias else None)[:2]
    if hasattr(layer, "norm"):
        return layer.dropout(layer.norm(text)), target
    return text, target, bias


def _decoder_block(layer: Layer, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    text, target, *bias = values
    # The first block's bias holds the mask as well.
    mask = None if bias else causal_mask(layer, target, positions_of(target))
    target, bias = layer.block(
        target, attention_mask=mask, position_bias=bias[0] if bias else None, encoder_hidden_states=text
    )[:2]
    return text, target, bias


def _norm(layer: Layer, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
    hidden = layer.dropout(layer.norm(values[1]))
    return hidden * layer.config.d_model**-0.5 if layer.config.scale_decoder_outputs else hidden


def _steps(model: PreTrainedModel) -> Steps:
    encoder, decoder = model.encoder, model.decoder
    embedding, head = ends(model, "shared", "lm_head")
    embedding = Step(embedding.modules, _embed, embedding.tied)
    blocks = [Step({"block": f"encoder.block.{index}"}, _encoder_block) for index in range(len(encoder.block))]
    # The encoder ends where its last block does, so that no bias is left over between stages.
    last = {**blocks[-1].modules, "norm": "encoder.final_layer_norm"}
    blocks[-1] = Step(last, _encoder_block, shared={"dropout": encoder.dropout})
    shared = {"config": decoder.config}
    blocks += [
        Step({"block": f"decoder.block.{index}"}, _decoder_block, shared=shared) for index in range(len(decoder.block))
    ]
    dropout = Step({}, _dropout, shared={"dropout": encoder.dropout})
    norm = Step(
        {"norm": "decoder.final_layer_norm"}, _norm, shared={"dropout": decoder.dropout, "config": decoder.config}
    )
    return Steps([embedding, dropout], blocks, [norm, head])


FAMILY = Family(
    model_type="t5",
    heads_key="num_heads",
    width_key="d_model",
    head_width_key="d_kv",
    defaults={"dropout_rate": 0.0},
    network="encoder_decoder",
    # Keys and values of the cross-attention.
    reads_encoder=(".EncDecAttention.k.", ".EncDecAttention.v."),
    blocks={"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"},
    heads=Units(
        "num_heads",
        ("layer.*.*Attention.[qkv]",),
        ("layer.*.*Attention.o",),
        size_key="d_kv",
        tables=("layer.*.SelfAttention.relative_attention_bias",),
    ),
    neurons=Units("d_ff", ("layer.*.DenseReluDense.wi*",), ("layer.*.DenseReluDense.wo",)),
    outline=Outline(
        splits={
            "shared": Split("vocabulary"),
            "lm_head": Split("vocabulary"),
            "relative_attention_bias": Split("heads"),
            "q": Split("column"),
            "k": Split("column"),
            "v": Split("column"),
            "o": Split("row"),
            "wi": Split("column"),
            "wi_0": Split("column"),
            "wi_1": Split("column"),
            "wo": Split("row"),
        },
        steps=_steps,
        shared_out={"num_heads": lambda config: config.num_heads, "d_ff": lambda config: config.d_ff},
        block_count=lambda config: config.num_layers + config.num_decoder_layers,
        inputs=("input_ids", "decoder_input_ids"),
    ),
)
