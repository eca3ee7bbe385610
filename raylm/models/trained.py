"""How much of a model a run trains, and how much of it is kept in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from raylm.config.stages import TrainConfig
from raylm.models.adapters import adapted_layers, new_modules
from raylm.models.depth import Freezing
from raylm.models.heads import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Packed(NamedTuple):
    """What of a model is kept in 4 bits.

    Attributes:
        share: of its parameters.
        largest: elements of the largest such weight.
    """

    share: float
    largest: int


def packed_weights(config: TrainConfig, model_config: PretrainedConfig, head: Head) -> Packed | None:
    """What of the model is kept in 4 bits, as ``adapter.bits`` says; None where it says nothing."""
    if config.adapter is None or config.adapter.bits is None:
        return None
    from raylm.models.four_bits import four_bit_layers
    from raylm.models.weights import make_outline

    model = make_outline(model_config, head).model
    sizes = [layer.weight.numel() for layer in four_bit_layers(model, head).values()]
    return Packed(sum(sizes) / sum(parameter.numel() for parameter in model.parameters()), max(sizes))


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
