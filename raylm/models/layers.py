"""The blocks of a model: where they are, and the same model with some of them.

In: a transformers model. Out: a smaller one with a valid configuration, whose blocks are some of the other's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from raylm.errors import UserError
from raylm.models.families import find_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# A T5 stack computes its relative positions in the first block, whichever that is.
FIRST_BLOCK_ALONE = "relative_attention_bias"
# Of families without a record.
KNOWN_KEYS = ("num_hidden_layers", "n_layers", "n_layer")


@dataclass(frozen=True)
class Blocks:
    """A list of blocks.

    Attributes:
        path: of the list in the model.
        key: of its length in the configuration.
        modules: the blocks.
    """

    path: str
    key: str
    modules: Sequence[nn.Module]


def find_blocks(model: PreTrainedModel) -> list[Blocks]:
    """The lists of blocks of a model: one, or those of encoder and decoder.

    Raises:
        UserError: it has none that are known.
    """
    family = find_family(model.config.model_type)
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if family is not None and family.blocks:
        return [
            Blocks(path, key, lists[path])
            for ending, key in family.blocks.items()
            for path in lists
            if path == ending or path.endswith(f".{ending}")
        ]
    for key in KNOWN_KEYS:
        count = getattr(model.config, key, None)
        found = [Blocks(path, key, blocks) for path, blocks in lists.items() if len(blocks) == count and _alike(blocks)]
        if len(found) == 1:
            return found
    raise UserError(f"model.path: found a {model.config.model_type} model, whose list of layers is not known")


def _alike(blocks: nn.ModuleList) -> bool:
    return len({type(block) for block in blocks}) == 1


def evenly(count: int, kept: int) -> list[int]:
    """``kept`` of ``count`` numbers, evenly spread, the first and the last among them."""
    if kept == 1:
        return [count - 1]
    return [round(place * (count - 1) / (kept - 1)) for place in range(kept)]


def with_layers(config: PretrainedConfig, numbers: dict[str, list[int]]) -> PretrainedConfig:
    """The configuration of the model that :func:`keep_layers` gives.

    Args:
        numbers: configuration key of a list of blocks -> numbers of those that remain.
    """
    smaller = copy.deepcopy(config)
    for key, kept in numbers.items():
        setattr(smaller, key, len(kept))
    # Kinds of attention, by layer.
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        smaller.layer_types = [kinds[number] for number in next(iter(numbers.values()))]
    return smaller


def keep_layers(model: PreTrainedModel, numbers: dict[str, list[int]]) -> PreTrainedModel:
    """A model of some blocks of ``model``, with copies of their weights.

    Args:
        numbers: configuration key of a list of blocks -> numbers of those that remain, in order.
    """
    smaller = type(model)(with_layers(model.config, numbers)).to(model.dtype)
    kept = {blocks.path: numbers[blocks.key] for blocks in find_blocks(model) if blocks.key in numbers}
    old = model.state_dict()
    weights = {name: old[_old_name(name, kept)] for name in smaller.state_dict()}
    smaller.load_state_dict(weights)
    if hasattr(model, "generation_config"):
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller


def _old_name(name: str, kept: dict[str, list[int]]) -> str:
    """The name in the larger model of a weight of the smaller one."""
    for path, numbers in kept.items():
        if name.startswith(f"{path}."):
            place, _, rest = name.removeprefix(f"{path}.").partition(".")
            number = int(place) if FIRST_BLOCK_ALONE in rest else numbers[int(place)]
            return f"{path}.{number}.{rest}"
    return name
