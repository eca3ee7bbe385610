"""How much the parts of a model matter, on samples or by their weights alone.

In: a model and batches of its task. Out: numbers, larger for what matters more: of each input of the matrices that
heads and neurons lead into, of each channel of the residual stream, of each block.

- ``weight``: the norm of what a part is multiplied with;
- ``activation``: root mean square of a part times that norm (as Wanda, arXiv:2306.11695, for whole columns); of a
  block how much it turns its input, 1 - cosine (ShortGPT, arXiv:2403.03853);
- ``taylor``: |activation x gradient|, the first-order change of the loss without the part (Molchanov et al. 2019,
  arXiv:1906.10771).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from raylm.compression.pruning.places import dimension
from raylm.models.layers import Blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raylm.tasks.objective import Batch, Objective


@contextmanager
def watched(model: PreTrainedModel, names: Sequence[str], watch: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``watch`` with the name and the input, [..., width], of each of these modules whenever they compute."""

    def hook(name: str) -> Any:
        return lambda module, arguments: watch(name, arguments[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def input_squares(
    model: PreTrainedModel, names: Sequence[str], objective: Objective, batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """Of each input of these modules, the mean square over all tokens."""
    sums = {name: torch.zeros(()) for name in names}
    counts = dict.fromkeys(names, 0)

    def watch(name: str, given: torch.Tensor) -> None:
        flat = given.detach().flatten(0, -2).float()
        sums[name] = sums[name] + flat.square().sum(dim=0)
        counts[name] += len(flat)

    with watched(model, names, watch), torch.no_grad():
        for batch in batches:
            objective.logits(model, batch)
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def input_gradients(
    model: PreTrainedModel, names: Sequence[str], objective: Objective, batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """Of each input of these modules, the sum over batches of the squared first-order change of the loss without it."""
    sums = {name: torch.zeros(()) for name in names}

    def watch(name: str, given: torch.Tensor) -> None:
        def receive(gradient: torch.Tensor) -> None:
            change = (gradient * given.detach()).flatten(0, -2).sum(dim=0)
            sums[name] = sums[name] + change.square()

        if given.requires_grad:
            given.register_hook(receive)

    with watched(model, names, watch):
        for batch in batches:
            objective.summed_loss(model, batch).backward()
            model.zero_grad(set_to_none=True)
    return sums


def input_scores(
    model: PreTrainedModel, names: Sequence[str], criterion: str, objective: Objective, batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """Of each input of these modules how much it matters, [width]."""
    if criterion == "taylor":
        return input_gradients(model, names, objective, batches)
    norms = {name: _input_norms(model.get_submodule(name)) for name in names}
    if criterion == "weight":
        return norms
    squares = input_squares(model, names, objective, batches)
    return {name: squares[name].sqrt() * norms[name] for name in names}


def _input_norms(module: nn.Module) -> torch.Tensor:
    """Norm of what each input of a linear layer is multiplied with."""
    return module.weight.detach().float().norm(dim=1 - dimension(module, "inputs"))


def block_scores(
    model: PreTrainedModel, blocks: Blocks, criterion: str, objective: Objective, batches: Sequence[Batch]
) -> list[float]:
    """How much each block of a list matters."""
    if criterion == "weight":
        return [sum(float(p.detach().float().square().sum()) for p in block.parameters()) for block in blocks.modules]
    if criterion == "taylor":
        return _block_gradients(model, blocks, objective, batches)
    totals, counts = [0.0] * len(blocks.modules), 0
    given: dict[int, torch.Tensor] = {}

    def before(number: int) -> Any:
        return lambda module, arguments, named: given.update({number: _hidden(arguments, named)})

    def after(number: int) -> Any:
        def compare(module: nn.Module, arguments: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            cosine = functional.cosine_similarity(given[number].float(), made.float(), dim=-1)
            totals[number] += float((1 - cosine).mean())

        return compare

    hooks = []
    for number, block in enumerate(blocks.modules):
        hooks.append(block.register_forward_pre_hook(before(number), with_kwargs=True))
        hooks.append(block.register_forward_hook(after(number)))
    try:
        with torch.no_grad():
            for batch in batches:
                objective.logits(model, batch)
                counts += 1
    finally:
        for hook in hooks:
            hook.remove()
    return [total / max(1, counts) for total in totals]


def _hidden(arguments: tuple, named: dict[str, Any]) -> torch.Tensor:
    return arguments[0] if arguments else named["hidden_states"]


def _block_gradients(
    model: PreTrainedModel, blocks: Blocks, objective: Objective, batches: Sequence[Batch]
) -> list[float]:
    """Of each block the summed first-order change of the loss without its weights."""
    totals = [0.0] * len(blocks.modules)
    for batch in batches:
        objective.summed_loss(model, batch).backward()
        for number, block in enumerate(blocks.modules):
            changes = [float((p.grad * p).sum().abs()) for p in block.parameters() if p.grad is not None]
            totals[number] += sum(changes)
        model.zero_grad(set_to_none=True)
    return totals
