"""A model's forward pass as steps, cut over tensor-parallel ranks and shared out over pipeline stages.

What each family needs for it, its table of cuts and its list of steps, stands in :mod:`raylm.parallel.families`.
Nothing of the models' own code is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from raylm.parallel.slicing import cut_evenly
from raylm.parallel.tensor import (
    ColumnParallel,
    RowParallel,
    TensorGroup,
    VocabularyEmbedding,
    part_of,
)

Values = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Cut:
    """How a layer is cut: along outputs, inputs, vocabulary or heads; ``parts`` matrices lie side by side."""

    kind: Literal["column", "row", "vocabulary", "heads"]
    parts: int = 1


@dataclass(frozen=True)
class Step:
    """One step of a model's forward pass.

    Attributes:
        modules: name inside the step -> name in the model, of modules and of single parameters.
        forward: from the :class:`StageLayer` that holds the modules, and what came in, to what goes on.
        tied: where the step's one module is used again in another step: its weight's name inside the step.
        shared: modules without parameters, and configurations, that several steps use.
    """

    modules: dict[str, str]
    forward: Callable[[StageLayer, Any], Values]
    tied: str | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Steps:
    """A model's forward pass: what comes first, the blocks, and what comes after them."""

    before: list[Step]
    blocks: list[Step]
    after: list[Step]


@dataclass(frozen=True)
class FamilyPlan:
    """How a family is cut; see :mod:`raylm.parallel.families`.

    Attributes:
        cuts: end of a module's name -> its cut.
        divided: class of a module -> attributes that are divided by the number of tensor-parallel ranks.
        steps: from a whole model to its steps.
        shared_out: what is shared out over tensor-parallel ranks, by name -> its number in a configuration.
        block_count: from a configuration to the number of blocks that ``steps`` gives.
        inputs: entries of a batch that the first step takes; a tuple of them where there are several.
    """

    cuts: dict[str, Cut]
    divided: dict[str, tuple[str, ...]]
    steps: Callable[[PreTrainedModel], Steps]
    shared_out: dict[str, Callable[[PretrainedConfig], int]]
    block_count: Callable[[PretrainedConfig], int]
    inputs: tuple[str, ...] = ("input_ids",)


class StageLayer(nn.Module):
    """The modules of one :class:`Step`, cut for this rank; calling it makes the step."""

    def __init__(self, step: Step, model: nn.Module, cuts: FamilyPlan, group: TensorGroup) -> None:
        super().__init__()
        self.step, self.group = step, group
        for name, path in step.modules.items():
            setattr(self, name, _cut_member(model, path, cuts, group))
        for name, value in step.shared.items():
            setattr(self, name, value)

    def forward(self, values: Values) -> Values:
        """What the step makes of ``values``."""
        return self.step.forward(self, values)

    def model_parameters(self):
        """(name in the model, parameter) of all parameters here."""
        for name, path in self.step.modules.items():
            member = getattr(self, name)
            if isinstance(member, nn.Parameter):
                yield path, member
            else:
                for inner, parameter in member.named_parameters():
                    yield f"{path}.{inner}", parameter


def _cut_member(model: nn.Module, path: str, plan: FamilyPlan, group: TensorGroup) -> nn.Module | nn.Parameter:
    parent, _, leaf = path.rpartition(".")
    member = getattr(model.get_submodule(parent), leaf)
    if isinstance(member, nn.Module):
        return cut_module(member, path, plan, group)
    if group.size == 1 or _find_cut(plan, path) is None:
        return member
    return part_of(member, cut_evenly(tuple(member.shape), 0, group.rank, group.size))


def _find_cut(plan: FamilyPlan, path: str) -> Cut | None:
    return next((cut for end, cut in plan.cuts.items() if f".{path}".endswith(f".{end}")), None)


def cut_module(module: nn.Module, path: str, plan: FamilyPlan, group: TensorGroup) -> nn.Module:
    """``module``, called ``path`` in the model, with its layers in the plan's table replaced by this rank's parts."""
    if group.size == 1:
        return module
    for name, inner in list(module.named_modules()):
        for attribute in plan.divided.get(type(inner).__name__, ()):
            setattr(inner, attribute, getattr(inner, attribute) // group.size)
        whole_name = f"{path}.{name}" if name else path
        cut = _find_cut(plan, whole_name)
        if cut is None:
            continue
        replacement = _cut_layer(inner, cut, group)
        if not name:
            return replacement
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, replacement)
    return module


def _cut_layer(layer: nn.Module, cut: Cut, group: TensorGroup) -> nn.Module:
    if cut.kind == "row":
        return RowParallel(layer, group)
    if cut.kind == "heads":
        layer.weight = part_of(layer.weight, cut_evenly(tuple(layer.weight.shape), 1, group.rank, group.size))
        return layer
    if isinstance(layer, nn.Embedding):
        return VocabularyEmbedding(layer, group)
    return ColumnParallel(layer, group, cut.parts, last=cut.kind == "vocabulary")


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
