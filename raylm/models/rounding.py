"""Weights rounded to 4 bits as nncf rounds them (``INT4_ASYM``, to the nearest), for training that knows of it.

In: a matrix in fp32. Out: the matrix that the export computes with. The gradient passes through the rounding as if it
were not there (straight-through: Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEVELS = 15


def rounded(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """``weight`` [outputs, inputs], fp32, with each group of inputs on 16 values; the same bits as the export's.

    Args:
        group_size: divides the inputs.
    """
    groups = weight.detach().unflatten(1, (-1, group_size))
    low = groups.amin(dim=2, keepdim=True).clamp(max=0.0)
    high = groups.amax(dim=2, keepdim=True).clamp(min=0.0)
    scale = (high - low) / LEVELS
    least = torch.finfo(torch.float32).eps
    scale = torch.where(scale.abs() < least, least, scale)
    zero = (-torch.round(low / scale)).clamp(0, LEVELS)
    codes = torch.round(groups / scale + zero).clamp(0, LEVELS)
    # Scales are stored in half precision.
    return ((codes - zero) * scale.half().float()).flatten(1)


class _StraightThrough(torch.autograd.Function):
    """Rounds on the way forward, and does nothing on the way back."""

    @staticmethod
    def forward(weight: torch.Tensor, group_size: int) -> torch.Tensor:
        # The export of a model in bf16 rounds what it has in fp32.
        return rounded(weight.float(), group_size).to(weight.dtype)

    @staticmethod
    def setup_context(context: object, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class RoundedLayer:
    """A linear layer whose weights are rounded.

    Attributes:
        module: the layer.
        transposed: whether its weight is [inputs, outputs], as GPT-2 has it.
    """

    module: nn.Module
    transposed: bool

    @property
    def inputs(self) -> int:
        """Width of what comes in."""
        return int(self.module.weight.shape[0 if self.transposed else 1])


def rounded_layers(module: nn.Module, kept: set[int]) -> list[RoundedLayer]:
    """The linear layers of ``module``.

    Args:
        kept: ids of parameters that are not rounded, see :func:`kept_whole`.
    """
    from transformers.pytorch_utils import Conv1D

    return [
        RoundedLayer(layer, isinstance(layer, Conv1D))
        for layer in module.modules()
        if isinstance(layer, nn.Linear | Conv1D) and id(layer.weight) not in kept
    ]


def round_in_training(module: nn.Module, group_size: int, kept: set[int]) -> None:
    """Have every linear layer of ``module`` compute with rounded weights; its own stay as they are, and are trained.

    Args:
        group_size: inputs that share a scale.
        kept: ids of parameters that are not rounded, see :func:`kept_whole`.
    """
    for layer in rounded_layers(module, kept):
        layer.module.forward = _forward(layer, group_size)


def _forward(layer: RoundedLayer, group_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's pass with rounded weights; under ZeRO 3 they are whole only within it."""
    module = layer.module

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        weight = module.weight.t() if layer.transposed else module.weight
        return functional.linear(inputs, _StraightThrough.apply(weight, group_size), module.bias)

    return forward


def kept_whole(model: PreTrainedModel) -> set[int]:
    """Ids of the parameters that the export keeps with 8 bits: embeddings, and what makes the outputs."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    last = model.get_output_embeddings() or next(reversed([m for m in model.modules() if isinstance(m, nn.Linear)]))
    return tables | {id(last.weight)}
