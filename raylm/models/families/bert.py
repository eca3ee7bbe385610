"""BERT: an encoder with learnt positions; its head has a transform and a bias."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from raylm.models.families.base import Family, Layer, Outline, Split, Step, Steps, Units
from raylm.models.families.steps import ends, positions_of, read_out_weight


def _embed(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    kinds = layer.kinds(torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device))
    return layer.dropout(layer.norm(hidden + kinds + layer.positions(positions_of(hidden))))


def _block(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.block(hidden)


def _transform(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    return layer.transform(hidden)


def _bias(layer: Layer, logits: torch.Tensor) -> torch.Tensor:
    return logits + layer.bias


def _steps(model: PreTrainedModel) -> Steps:
    embedding, head = ends(model, "bert.embeddings.word_embeddings", "cls.predictions.decoder")
    if head.tied is None:
        # Without the bias, which is the next step's.
        head = Step({"head": "cls.predictions.decoder.weight"}, read_out_weight)
    places = {
        "kinds": "bert.embeddings.token_type_embeddings",
        "positions": "bert.embeddings.position_embeddings",
        "norm": "bert.embeddings.LayerNorm",
    }
    rest = Step(places, _embed, shared={"dropout": model.bert.embeddings.dropout})
    blocks = [Step({"block": f"bert.encoder.layer.{index}"}, _block) for index in range(len(model.bert.encoder.layer))]
    transform = Step({"transform": "cls.predictions.transform"}, _transform)
    return Steps([embedding, rest], blocks, [transform, head, Step({"bias": "cls.predictions.bias"}, _bias)])


FAMILY = Family(
    model_type="bert",
    heads_key="num_attention_heads",
    width_key="hidden_size",
    positions_key="max_position_embeddings",
    defaults={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    network="encoder",
    blocks={"encoder.layer": "num_hidden_layers"},
    heads=Units("num_attention_heads", ("attention.self.[qkv]*",), ("attention.output.dense",)),
    neurons=Units("intermediate_size", ("intermediate.dense",), ("output.dense",)),
    outline=Outline(
        splits={
            "word_embeddings": Split("vocabulary"),
            "predictions.decoder.weight": Split("vocabulary"),
            "predictions.bias": Split("vocabulary"),
            "self.query": Split("column"),
            "self.key": Split("column"),
            "self.value": Split("column"),
            "intermediate.dense": Split("column"),
            "output.dense": Split("row"),
        },
        steps=_steps,
        shared_out={
            "num_attention_heads": lambda config: config.num_attention_heads,
            "intermediate_size": lambda config: config.intermediate_size,
        },
        block_count=lambda config: config.num_hidden_layers,
    ),
)
