"""Smaller dense models: heads, neurons and channels are taken out of the weights, and the configuration says so.

In: a model, and which of each are kept. Out: a model of the same class with a valid configuration, whose weights are
slices of the other's. Every block keeps as many as any other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from raylm.compression.pruning.places import Place, dimension, find_places
from raylm.models.families.base import Family, Units
from raylm.models.families.build import fused_parts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def cut_config(config: PretrainedConfig, units: Units, kept: int, groups: int) -> PretrainedConfig:
    """The configuration of a model with ``kept`` of its ``groups`` units left in each block."""
    smaller = copy.deepcopy(config)
    if units.shared_key is not None and (shared := getattr(config, units.shared_key, None)):
        setattr(smaller, units.shared_key, shared * kept // groups)
        setattr(smaller, units.key, getattr(config, units.key) * kept // groups)
    else:
        setattr(smaller, units.key, kept)
    if units.size_key is not None and getattr(config, units.size_key, None) is None:
        # Else it would follow from the new number of heads.
        setattr(smaller, units.size_key, config.hidden_size // getattr(config, units.key))
    return smaller


class Surgery:
    """Cuts in the weights of one model, out of which :meth:`build` makes another.

    Args:
        model: is left as it is.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self._model, self._family = model, family
        self._state, self.config = dict(model.state_dict()), copy.deepcopy(model.config)

    def units(self, kept: Sequence[tuple[Place, Sequence[int]]]) -> None:
        """Take out the heads or neurons that are not in ``kept``, of which each place has equally many."""
        for place, numbers in kept:
            inputs = place.inputs(numbers)
            for name in place.sources:
                self._take(name, "outputs", inputs, fused_parts(f"{name}.weight", self._family.model_type))
            for name in place.shared_sources:
                self._take(name, "outputs", place.shared(numbers, self._model.get_submodule(name).out_features))
            for name in place.tables:
                self._state[f"{name}.weight"] = self._state[f"{name}.weight"][:, torch.as_tensor(list(numbers))]
            self._take(place.sink, "inputs", inputs)
        place, first = kept[0]
        self.config = cut_config(self.config, place.units, len(first), place.count)

    def width(self, kept: torch.Tensor) -> None:
        """Leave the channels ``kept``, int64 [width], of the residual stream."""
        family, model = self._family, self._model
        assert family.width_key is not None
        old, places = int(getattr(model.config, family.width_key)), all_places(model, family)
        sources = {name for place in places for name in (*place.sources, *place.shared_sources)}
        sinks, tables = {place.sink for place in places}, {name for place in places for name in place.tables}
        for name, module in model.named_modules():
            if name in tables:
                continue
            for key, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{key}" if name else key
                if name in sources:
                    numbers = [dimension(module, "inputs")] if key == "weight" else []
                elif name in sinks:
                    numbers = [dimension(module, "outputs")] if key == "weight" else [0]
                else:
                    numbers = _residual(module, parameter, old, makes_outputs=module is model.get_output_embeddings())
                for number in numbers:
                    self._state[full] = self._state[full].index_select(number, kept)
        self.config = width_config(self.config, family, len(kept))

    def build(self) -> PreTrainedModel:
        """The smaller model."""
        smaller = type(self._model)(self.config).to(self._model.dtype)
        expected = smaller.state_dict()
        # Buffers that follow from the shape are the new model's own.
        smaller.load_state_dict({name: self._state.get(name, value) for name, value in expected.items()})
        if hasattr(self._model, "generation_config"):
            smaller.generation_config = copy.deepcopy(self._model.generation_config)
        return smaller.eval()

    def _take(self, name: str, side: str, numbers: torch.Tensor, parts: int = 1) -> None:
        """Keep only some inputs or outputs of a linear layer.

        Args:
            parts: matrices side by side among its outputs, of each of which the same are kept.
        """
        state, number = self._state, dimension(self._model.get_submodule(name), side)
        each = state[f"{name}.weight"].shape[number] // parts
        chosen = torch.cat([numbers + part * each for part in range(parts)])
        state[f"{name}.weight"] = state[f"{name}.weight"].index_select(number, chosen)
        if side == "outputs" and f"{name}.bias" in state:
            state[f"{name}.bias"] = state[f"{name}.bias"].index_select(0, chosen)


def all_places(model: PreTrainedModel, family: Family) -> list[Place]:
    """The attentions and feed-forward networks of a model."""
    return [
        place for units in (family.heads, family.neurons) if units is not None for place in find_places(model, units)
    ]


def width_config(config: PretrainedConfig, family: Family, kept: int) -> PretrainedConfig:
    """The configuration with a residual stream of ``kept`` channels; what followed from the old width stays."""
    smaller, old = copy.deepcopy(config), int(getattr(config, str(family.width_key)))
    if family.head_width_key is not None and getattr(config, family.head_width_key, None) is None:
        setattr(smaller, family.head_width_key, old // getattr(config, str(family.heads_key)))
    if family.neurons is not None and getattr(config, family.neurons.key, None) is None:
        setattr(smaller, family.neurons.key, 4 * old)
    setattr(smaller, str(family.width_key), kept)
    return smaller


def _residual(module: nn.Module, parameter: torch.Tensor, width: int, *, makes_outputs: bool) -> list[int]:
    """The dimensions that are the residual stream's, of a parameter that is in no attention or feed-forward network."""
    if makes_outputs or isinstance(module, nn.Embedding):
        return [1] if parameter.dim() == 2 and parameter.shape[1] == width else []
    return [number for number, size in enumerate(parameter.shape) if size == width]
