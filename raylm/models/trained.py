"""How much of a model a run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylm.config.stages import TrainConfig
from raylm.models.adapters import adapted_layers, new_modules
from raylm.models.depth import Freezing
from raylm.models.heads import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def trained_share(config: TrainConfig, model_config: PretrainedConfig, head: Head) -> float:
    """Parameters that are trained, as a share of the model's own."""
    if config.adapter is None and config.freezing is None:
        return 1.0
    from raylm.models.weights import make_outline

    model = make_outline(model_config, head).model
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if config.freezing is not None:
        freezing = Freezing(config.freezing, model)
        return sum(size for name, size in sizes.items() if freezing.trains(name)) / sum(sizes.values())
    section = config.adapter
    assert section is not None
    trained = sum(size for name, size in sizes.items() if name.partition(".")[0] in new_modules(model, head))
    for layer in adapted_layers(model, section, head).values():
        # Both kinds of layer have a matrix of their inputs and outputs.
        trained += section.rank * sum(layer.weight.shape) + (max(layer.weight.shape) if section.type == "dora" else 0)
    return trained / sum(sizes.values())
