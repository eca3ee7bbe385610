"""Weights that become zero: a share of each matrix, or two of four side by side.

In: a model and, but for magnitude, batches of its task. Out: the model with zeros, its shapes unchanged. Only matrices
within blocks are touched. The criteria: magnitude; Wanda (Sun et al. 2023, arXiv:2306.11695), |weight| times the norm
of its input, compared within each output; SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), which goes through
the inputs of a matrix in order and makes up for each weight that goes in those that follow, by the inverse of the
inputs' second moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raylm.compression.pruning.importance import watched
from raylm.compression.pruning.places import dimension
from raylm.models.layers import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raylm.tasks.objective import Batch, Objective

# SparseGPT's defaults: inputs that are decided on together, and the share of the mean that is added to the diagonal.
BLOCK, DAMPING = 128, 0.01


def linear_names(model: PreTrainedModel) -> list[list[str]]:
    """Names of the linear layers, a list for each block."""
    from transformers.pytorch_utils import Conv1D

    found = []
    for blocks in find_blocks(model):
        for number, block in enumerate(blocks.modules):
            prefix = f"{blocks.path}.{number}."
            found.append([prefix + n for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)])
    return found


@dataclass
class _Call:
    """How a block was called with one batch: its hidden states change as the blocks before it do, the rest stays."""

    arguments: tuple
    named: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """What comes out of the block before."""
        return self.arguments[0] if self.arguments else self.named["hidden_states"]

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's new hidden states."""
        if self.arguments:
            made = block(hidden, *self.arguments[1:], **self.named)
        else:
            made = block(**{**self.named, "hidden_states": hidden})
        return made[0] if isinstance(made, tuple) else made


@torch.no_grad()
def set_zeros(
    model: PreTrainedModel,
    criterion: str,
    sparsities: Sequence[float],
    pattern: str,
    objective: Objective,
    batches: Sequence[Batch],
) -> None:
    """Set weights of ``model`` to zero, block after block, each seeing what the ones before have become.

    Args:
        criterion: weight, wanda or sparsegpt.
        sparsities: share of each block's weights.
        pattern: unstructured, or 2:4.
    """
    names = iter(zip(linear_names(model), sparsities, strict=True))
    for blocks in find_blocks(model):
        calls = _calls(model, blocks.modules, objective, batches) if criterion != "weight" else []
        hidden = [call.hidden for call in calls[0]] if calls else []
        for number, block in enumerate(blocks.modules):
            (linear, sparsity), moments = next(names), {}
            if calls:
                with _measured(model, linear, criterion) as moments:
                    for call, given in zip(calls[number], hidden, strict=True):
                        call.run(block, given)
            for name in linear:
                _set_zeros(model.get_submodule(name), criterion, sparsity, pattern, moments.get(name))
            if calls:
                hidden = [call.run(block, given) for call, given in zip(calls[number], hidden, strict=True)]


def _set_zeros(module: nn.Module, criterion: str, sparsity: float, pattern: str, moments: torch.Tensor | None) -> None:
    """Set weights of one matrix to zero."""
    # [outputs, inputs] from here on.
    weight = module.weight.data if dimension(module, "inputs") == 1 else module.weight.data.t()
    if criterion == "sparsegpt":
        assert moments is not None
        weight.copy_(sparse_gpt(weight.float(), moments, sparsity, pattern))
    else:
        scale = None if moments is None else moments.sqrt()
        weight.masked_fill_(lowest(weight, scale, sparsity, pattern), 0.0)


def _calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], objective: Objective, batches: Sequence[Batch]
) -> list[list[_Call]]:
    """How each block is called with each batch, by one pass of the whole model."""
    found: list[list[_Call]] = [[] for _ in blocks]

    def note(number: int) -> Any:
        return lambda module, arguments, named: found[number].append(_Call(arguments, dict(named)))

    hooks = [block.register_forward_pre_hook(note(n), with_kwargs=True) for n, block in enumerate(blocks)]
    try:
        for batch in batches:
            objective.logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _measured(model: PreTrainedModel, names: Sequence[str], criterion: str) -> Iterator[dict[str, torch.Tensor]]:
    """Of the inputs of each layer the mean squares, [inputs], or for SparseGPT all second moments, [inputs, inputs];
    there after the block."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, given: torch.Tensor) -> None:
        flat = given.flatten(0, -2).float()
        found = flat.t() @ flat if criterion == "sparsegpt" else flat.square().sum(dim=0)
        sums[name] = sums[name] + found if name in sums else found
        counts[name] = counts.get(name, 0) + len(flat)

    moments: dict[str, torch.Tensor] = {}
    with watched(model, names, watch):
        yield moments
    moments |= {name: sums[name] / counts[name] for name in sums}


def lowest(weight: torch.Tensor, scale: torch.Tensor | None, sparsity: float, pattern: str) -> torch.Tensor:
    """Where ``weight`` [outputs, inputs] is to be zero, bool of its shape.

    Args:
        scale: of each input, [inputs]; then each output is compared in itself. None compares the whole matrix.
    """
    score = weight.abs().float() if scale is None else weight.abs().float() * scale
    if pattern == "2:4":
        groups = score.unflatten(1, (-1, 4))
        order = groups.argsort(dim=2)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :2], True).flatten(1)
    if scale is None:
        gone = round(sparsity * score.numel())
        mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        mask[score.flatten().argsort()[:gone]] = True
        return mask.view_as(score)
    gone = round(sparsity * score.shape[1])
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.argsort(dim=1)[:, :gone], True)


def sparse_gpt(weight: torch.Tensor, moments: torch.Tensor, sparsity: float, pattern: str) -> torch.Tensor:
    """``weight`` [outputs, inputs] with zeros, and with what makes up for them.

    Args:
        moments: mean of the products of inputs, [inputs, inputs].
    """
    weight, moments = weight.clone(), moments.double().clone()
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1.0
    weight[:, dead] = 0.0
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).float()
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        part, own = weight[:, first:last].clone(), inverse[first:last, first:last]
        score = part.square() / own.diagonal().square()
        mask = torch.zeros(part.shape, dtype=torch.bool)
        if pattern != "2:4":
            gone = round(sparsity * score.numel())
            mask.view(-1)[score.flatten().argsort()[:gone]] = True
        errors = torch.zeros_like(part)
        for place in range(last - first):
            if pattern == "2:4" and place % 4 == 0:
                near = part[:, place : place + 4].square() / own.diagonal()[place : place + 4].square()
                mask[:, place : place + 4].scatter_(1, near.argsort(dim=1)[:, :2], True)
            before = part[:, place].clone()
            part[:, place] = before.masked_fill(mask[:, place], 0.0)
            error = (before - part[:, place]) / own[place, place]
            part[:, place + 1 :] -= error[:, None] * own[place, place + 1 :]
            errors[:, place] = error
        weight[:, first:last] = part
        weight[:, last:] -= errors @ inverse[first:last, last:]
    return weight
