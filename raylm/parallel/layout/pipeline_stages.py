"""A model's forward pass as steps, cut over tensor-parallel ranks and shared out over pipeline stages.

What each family needs for it, its table of splits and its list of steps, stands in its
:class:`raylm.models.families.base.Outline`.
Nothing of the models' own code is changed.
"""

from __future__ import annotations

import torch
from torch import nn

from raylm.models.families.base import Outline, Split, Step, Steps, Values
from raylm.parallel.layout.slicing import cut_evenly
from raylm.parallel.layout.tensor import (
    ColumnParallel,
    RowParallel,
    TensorGroup,
    VocabularyEmbedding,
    copy_to_parts,
    part_of,
)


class StageLayer(nn.Module):
    """The modules of one :class:`Step`, split for this rank; calling it makes the step."""

    def __init__(self, step: Step, model: nn.Module, outline: Outline, group: TensorGroup) -> None:
        super().__init__()
        self.step, self.group = step, group
        for name, path in step.modules.items():
            setattr(self, name, _split_member(model, path, outline, group))
        for name, value in step.shared.items():
            setattr(self, name, value)

    def forward(self, values: Values) -> Values:
        """What the step makes of ``values``; as the next stage may be sent it, each tensor in one piece of memory."""
        made = self.step.forward(self, values)
        return tuple(value.contiguous() for value in made) if isinstance(made, tuple) else made.contiguous()

    def copy_to_parts(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` as the input of a weight that each rank holds a part of; see the steps' ``Layer``."""
        return copy_to_parts(hidden, self.group)

    def model_parameters(self):
        """(name in the model, parameter) of all parameters here."""
        for name, path in self.step.modules.items():
            member = getattr(self, name)
            if isinstance(member, nn.Parameter):
                yield path, member
            else:
                for inner, parameter in member.named_parameters():
                    yield f"{path}.{inner}", parameter


def _split_member(model: nn.Module, path: str, outline: Outline, group: TensorGroup) -> nn.Module | nn.Parameter:
    parent, _, leaf = path.rpartition(".")
    member = getattr(model.get_submodule(parent), leaf)
    if isinstance(member, nn.Module):
        return split_module(member, path, outline, group)
    if group.size == 1 or _find_split(outline, path) is None:
        return member
    return part_of(member, cut_evenly(tuple(member.shape), 0, group.rank, group.size))


def _find_split(outline: Outline, path: str) -> Split | None:
    return next((split for end, split in outline.splits.items() if f".{path}".endswith(f".{end}")), None)


def split_module(module: nn.Module, path: str, outline: Outline, group: TensorGroup) -> nn.Module:
    """``module``, called ``path`` in the model, its layers in the outline's table replaced by this rank's parts."""
    if group.size == 1:
        return module
    for name, inner in list(module.named_modules()):
        for attribute in outline.divided.get(type(inner).__name__, ()):
            setattr(inner, attribute, getattr(inner, attribute) // group.size)
        whole_name = f"{path}.{name}" if name else path
        split = _find_split(outline, whole_name)
        if split is None:
            continue
        replacement = _split_layer(inner, split, group)
        if not name:
            return replacement
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, replacement)
    return module


def _split_layer(layer: nn.Module, split: Split, group: TensorGroup) -> nn.Module:
    if split.kind == "row":
        return RowParallel(layer, group)
    if split.kind == "heads":
        layer.weight = part_of(layer.weight, cut_evenly(tuple(layer.weight.shape), 1, group.rank, group.size))
        return layer
    if isinstance(layer, nn.Embedding):
        return VocabularyEmbedding(layer, group)
    return ColumnParallel(layer, group, split.parts, last=split.kind == "vocabulary")


def balanced_stages(steps: Steps, weights: list[float], stages: int) -> list[int]:
    """Where the stages begin in ``before + blocks + after``: at least one block each, the heaviest as light as can be.

    Args:
        weights: of all steps, in order: their parameters, or their time.

    Returns:
        ``stages + 1`` indices.
    """
    first, count = len(steps.before), len(steps.blocks)
    blocks = list(weights[first : first + count])
    blocks[0] += sum(weights[:first])
    blocks[-1] += sum(weights[first + count :])
    # heaviest[n] -> for the first n blocks: (weight of the heaviest stage, its last stage's beginning)
    heaviest: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(stages):
        before, now = heaviest[-1], {}
        for stop in range(1, count + 1):
            choices = [
                (max(best, sum(blocks[start:stop])), start) for start, (best, _) in before.items() if start < stop
            ]
            if choices:
                now[stop] = min(choices)
        heaviest.append(now)
    bounds = [count]
    for stage in range(stages, 0, -1):
        bounds.append(heaviest[stage][bounds[-1]][1])
    inner = [first + bound for bound in reversed(bounds[1:-1])]
    return [0, *inner, len(weights)]


def step_weights(model: nn.Module, steps: list[Step]) -> list[float]:
    """Parameters of each step; a tied weight counts where it is used, as each stage that uses it holds it."""

    def size(path: str) -> int:
        parent, _, leaf = path.rpartition(".")
        member = getattr(model.get_submodule(parent), leaf)
        parameters = [member] if isinstance(member, nn.Parameter) else member.parameters()
        return sum(parameter.numel() for parameter in parameters)

    return [float(sum(size(path) for path in step.modules.values())) for step in steps]
