"""What each cut costs: the loss on samples after a cut by a step, for each kind of cut and each block.

In: a model and batches of its task. Out: the numbers of layers, heads and neurons that a budget of parameters is best
spent on; or the share of zeros that each block takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from raylm.compression.pruning.places import dimension
from raylm.compression.pruning.zeros import linear_names, lowest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raylm.tasks.objective import Batch, Objective

# How far a block's share of zeros may be from the mean (OWL, arXiv:2310.05175, has 0.08).
MOST_APART = 0.08


@torch.no_grad()
def mean_loss(model: PreTrainedModel, objective: Objective, batches: Sequence[Batch]) -> float:
    """Nats a target."""
    total, count = 0.0, 0
    for batch in batches:
        total += float(objective.loss(objective.logits(model, batch), batch["targets"]))
        count += int((batch["targets"] >= 0).sum())
    return total / max(1, count)


@torch.no_grad()
def block_sparsities(
    model: PreTrainedModel, sparsity: float, objective: Objective, batches: Sequence[Batch]
) -> tuple[list[float], list[dict[str, Any]]]:
    """The share of zeros of each block, ``sparsity`` on average: less where zeros cost more.

    Returns:
        the shares, and a table of what zeros in each block alone cost.
    """
    names, before = linear_names(model), mean_loss(model, objective, batches)
    costs = []
    for block in names:
        kept = {name: model.get_submodule(name).weight.data.clone() for name in block}
        for name in block:
            module = model.get_submodule(name)
            weight = module.weight.data if dimension(module, "inputs") == 1 else module.weight.data.t()
            weight.masked_fill_(lowest(weight, None, sparsity, "unstructured"), 0.0)
        costs.append(mean_loss(model, objective, batches) - before)
        for name, weight in kept.items():
            model.get_submodule(name).weight.data.copy_(weight)
    # By rank, evenly from more to less, so that one block that costs very much does not decide alone.
    order = sorted(range(len(costs)), key=lambda number: costs[number])
    reach, shares = min(MOST_APART, sparsity, 1 - sparsity), [sparsity] * len(costs)
    for rank, number in enumerate(order):
        if len(costs) > 1:
            shares[number] = sparsity + reach * (1 - 2 * rank / (len(costs) - 1))
    table = [
        {"block": number, "loss": before + cost, "sparsity": share}
        for number, (cost, share) in enumerate(zip(costs, shares, strict=True))
    ]
    return shares, table
