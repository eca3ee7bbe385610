"""Where the heads and neurons of a model are: between which matrices, in which of its blocks.

In: a model, and what its family's record says of a block. Out: a :class:`Place` for each attention and feed-forward
network, which counts, scores and indexes what can be cut out there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from raylm.models.families.base import Units
from raylm.models.layers import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Place:
    """One attention or feed-forward network.

    Attributes:
        units: what can be cut there, as the family has it.
        stack: path of the list of blocks that it is in.
        sink: name in the model of the module whose inputs the units are.
        sources: names of those whose outputs they are.
        shared_sources: names of those whose outputs groups of units share.
        tables: names of embeddings with a column for each unit.
        count: of units; of heads in groups, groups.
        size: inputs of the sink that belong to a unit.
    """

    units: Units
    stack: str
    sink: str
    sources: tuple[str, ...]
    shared_sources: tuple[str, ...]
    tables: tuple[str, ...]
    count: int
    size: int

    def inputs(self, kept: Sequence[int]) -> torch.Tensor:
        """Numbers of the sink's inputs that belong to the units ``kept``."""
        return _spread(kept, self.size)

    def shared(self, kept: Sequence[int], outputs: int) -> torch.Tensor:
        """Numbers of the outputs of a shared source, of which there are ``outputs``."""
        return _spread(kept, outputs // self.count)


def _spread(kept: Sequence[int], size: int) -> torch.Tensor:
    return (torch.as_tensor(list(kept))[:, None] * size + torch.arange(size)).flatten()


def width_in(module: nn.Module) -> int:
    """Inputs of a linear layer, also of GPT-2's, whose weight is [inputs, outputs]."""
    return int(module.weight.shape[0] if _transposed(module) else module.weight.shape[1])


def _transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def dimension(module: nn.Module, side: str) -> int:
    """The dimension of a layer's weight that its ``side``, inputs or outputs, is."""
    return int((side == "inputs") != _transposed(module))


def find_places(model: PreTrainedModel, units: Units) -> list[Place]:
    """All places of ``units``, block after block."""
    found = []
    config = model.config
    count = _count(model, units)
    groups = count if units.shared_key is None else int(getattr(config, units.shared_key, None) or count)
    for blocks in find_blocks(model):
        for number, block in enumerate(blocks.modules):
            prefix = f"{blocks.path}.{number}."
            names = [name for name, _ in block.named_modules()]
            sinks = _matching(names, units.sinks)
            for sink in sinks:
                # A block of a decoder has two attentions; what belongs to one stands beside its sink.
                near = names if len(sinks) == 1 else [n for n in names if n.startswith(f"{sink.rpartition('.')[0]}.")]
                found.append(
                    Place(
                        units,
                        blocks.path,
                        prefix + sink,
                        tuple(prefix + name for name in _matching(near, units.sources)),
                        tuple(prefix + name for name in _matching(near, units.shared_sources)),
                        tuple(prefix + name for name in _matching(near, units.tables)),
                        groups,
                        width_in(block.get_submodule(sink)) // groups,
                    )
                )
    return found


def _count(model: PreTrainedModel, units: Units) -> int:
    """Heads or neurons of a block; GPT-2's configuration may leave its neurons open."""
    count = getattr(model.config, units.key, None)
    if count is not None:
        return int(count)
    block = find_blocks(model)[0].modules[0]
    (sink, *_) = _matching([name for name, _ in block.named_modules()], units.sinks)
    return width_in(block.get_submodule(sink))


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
