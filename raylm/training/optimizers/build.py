"""Optimizers by name, over parameter groups that carry what the engine and the checkpoints need to know.

Every group has ``peak_learning_rate`` (the schedule multiplies it), ``opens`` (the step with which its training begins)
and ``moments``: the names of its state tensors. Parameters at the top of the model come in the first groups. Weight
decay falls on matrices and embeddings; vectors (norms, biases) have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raylm.config.training import TrainingSection
from raylm.models.chains import CHAIN
from raylm.models.depth import Rate
from raylm.models.families.build import fused_parts
from raylm.models.structure import lookup_names, read_out_names
from raylm.training.optimizers.muon import Muon

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
Named = dict[str, nn.Parameter]
Rates = Callable[[str], Rate]


def _dimensions(parameter: torch.Tensor) -> int:
    # What ZeRO 3 has shared out already keeps its shape here.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def hidden_matrices(named: dict[str, nn.Parameter], model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Those of the parameters ``named`` that are matrices between hidden layers of ``model``: what Muon is for.

    Weights that are looked up, all of the head that makes logits of tokens, and a chain over tags are not.
    """
    outer = lookup_names(model) | read_out_names(model)
    return {
        name: p
        for name, p in named.items()
        if _dimensions(p) == 2 and name not in outer and not name.startswith(f"{CHAIN}.")
    }


def make_optimizer(
    training: TrainingSection, named: Named, model: PreTrainedModel, rates: Rates = lambda name: Rate()
) -> torch.optim.Optimizer:
    """The optimizer of ``training`` over the parameters ``named`` by their names in ``model``.

    Args:
        rates: how each is trained.
    """
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "sgd":
        groups = _decay_groups(named, rates, decay, rate, ("momentum_buffer",) if training.momentum else ())
        return torch.optim.SGD(groups, lr=rate, momentum=training.momentum)
    adam = {"lr": rate, "betas": tuple(training.betas), "eps": training.epsilon, "fused": True}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(_decay_groups(named, rates, decay, rate, ADAM_MOMENTS), **adam)
    matrices = hidden_matrices(named, model)
    rest = {name: p for name, p in named.items() if name not in matrices}
    groups = [{**group, "orthogonal": False} for group in _decay_groups(rest, rates, decay, rate, ADAM_MOMENTS)]
    groups += [
        {
            "params": list(part.values()),
            "names": list(part),
            "parts": {name: fused_parts(name, model.config.model_type) for name in part},
            "orthogonal": True,
            "dtype": torch.bfloat16 if training.precision == "bf16" else torch.float32,
            "momentum": training.momentum,
            "weight_decay": decay,
            **common,
        }
        for part, common in _by_rate(matrices, rates, training.matrix_learning_rate, ("momentum_buffer",))
    ]
    return Muon(groups, **adam)


def _by_rate(
    named: Named, rates: Rates, peak: float, moments: tuple[str, ...]
) -> Iterator[tuple[Named, dict[str, Any]]]:
    """The parameters by how they are trained, with what their groups have in common; the fastest and earliest first."""
    known = {name: rates(name) for name in named}
    for rate in sorted(set(known.values()), key=lambda rate: (rate.opens, -rate.factor)):
        part = {name: parameter for name, parameter in named.items() if known[name] == rate}
        yield part, {"peak_learning_rate": peak * rate.factor, "opens": rate.opens, "moments": moments}


def _decay_groups(named: Named, rates: Rates, decay: float, peak: float, moments: tuple[str, ...]) -> list[dict]:
    groups: list[dict] = []
    for part, common in _by_rate(named, rates, peak, moments):
        decayed = [p for p in part.values() if _dimensions(p) >= 2]
        plain = [p for p in part.values() if _dimensions(p) < 2]
        groups.append({"params": decayed, "weight_decay": decay, **common})
        groups.append({"params": plain, "weight_decay": 0.0, **common})
    return [group for group in groups if group["params"]]
