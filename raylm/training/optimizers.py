"""Optimizers by name, over parameter groups that carry what the engine and the checkpoints need to know.

Every group has ``peak_learning_rate`` (the schedule multiplies it) and ``moments``: the names of its state tensors.
Weight decay falls on matrices and embeddings; vectors (norms, biases) have none.
"""

from __future__ import annotations

import torch
from torch import nn

from raylm.config.training import TrainingSection
from raylm.models.families import fused_parts
from raylm.training.muon import Muon

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
# Matrices that are looked up or read out rather than multiplied between layers.
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "lm_head", "embed_in", "embed_out", "shared", "word_embeddings",
              "position_embeddings", "token_type_embeddings", "relative_attention_bias", "predictions")  # fmt: skip


def _dimensions(parameter: torch.Tensor) -> int:
    # What ZeRO 3 has shared out already keeps its shape here.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` is a weight matrix between hidden layers: what Muon is for."""
    return _dimensions(parameter) == 2 and not any(part in EMBEDDINGS for part in name.split("."))


def make_optimizer(training: TrainingSection, named: dict[str, nn.Parameter], model_type: str) -> torch.optim.Optimizer:
    """The optimizer of ``training`` over the parameters ``named`` by their Hugging Face names."""
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "sgd":
        groups = _decay_groups(named, decay, rate, ("momentum_buffer",) if training.momentum else ())
        return torch.optim.SGD(groups, lr=rate, momentum=training.momentum)
    adam = {"lr": rate, "betas": tuple(training.betas), "eps": training.epsilon, "fused": True}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(_decay_groups(named, decay, rate, ADAM_MOMENTS), **adam)
    matrices = {name: p for name, p in named.items() if is_hidden_matrix(name, p)}
    rest = {name: p for name, p in named.items() if name not in matrices}
    groups = [{**group, "orthogonal": False} for group in _decay_groups(rest, decay, rate, ADAM_MOMENTS)]
    groups.append(
        {
            "params": list(matrices.values()),
            "names": list(matrices),
            "parts": {name: fused_parts(name, model_type) for name in matrices},
            "orthogonal": True,
            "dtype": torch.bfloat16 if training.precision == "bf16" else torch.float32,
            "momentum": training.momentum,
            "weight_decay": decay,
            "peak_learning_rate": training.matrix_learning_rate,
            "moments": ("momentum_buffer",),
        }
    )
    return Muon(groups, **adam)


def _decay_groups(named: dict[str, nn.Parameter], decay: float, rate: float, moments: tuple[str, ...]) -> list[dict]:
    common = {"peak_learning_rate": rate, "moments": moments}
    decayed = [p for p in named.values() if _dimensions(p) >= 2]
    plain = [p for p in named.values() if _dimensions(p) < 2]
    groups = [
        {"params": decayed, "weight_decay": decay, **common},
        {"params": plain, "weight_decay": 0.0, **common},
    ]
    return [group for group in groups if group["params"]]
