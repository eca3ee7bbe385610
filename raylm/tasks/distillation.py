"""What a model learns from a teacher: its distributions, its hidden states, its attention.

In: both models, of one tokenizer and task, and a batch. Out: a summed loss. As any loss here it is a sum over counted
targets, so that the result does not depend on how a batch is cut into micro-batches or shared by workers: what is a
mean over the tokens of a sequence counts as often as the sequence has targets.

The weights of the section add up

- ``logits``: temperature^2 x KL(teacher || model), of both distributions softened (Hinton et al. 2015);
- ``targets``: the task's own loss;
- ``hidden``: the mean squared difference of the outputs of mapped layers (TinyBERT, arXiv:1909.10351, without its
  projection: the widths are the same);
- ``attention``: that of their attention probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from raylm.data.samples.token_samples import IGNORED
from raylm.models.layers import evenly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raylm.tasks.objective import Batch, Objective

# Rows whose distributions are in memory at a time.
ROWS = 512
# What is left for all other choices, at least: rounded log-probabilities may add up to more than 1.
LEAST_LEFT = 1e-6


class SoftenedDivergence(torch.autograd.Function):
    """``temperature``^2 times the sum over rows of KL(teacher || model).

    The gradient with respect to the logits, temperature x (model - teacher), comes with the loss, so that no copy of
    the logits but this one is kept.
    """

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        for first in range(0, len(logits), ROWS):
            rows = slice(first, first + ROWS)
            found, expected = (torch.log_softmax(one[rows].float() / temperature, dim=-1) for one in (logits, teacher))
            likely = expected.exp()
            total += (likely * (expected - found)).sum()
            gradient[rows] = (found.exp() - likely) * temperature
        context.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    def backward(context: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * outer, None, None


class CoarseDivergence(torch.autograd.Function):
    """``temperature``^2 times the sum over rows of KL(teacher || model) over some choices and all others as one.

    With e the teacher's probability of a known choice and, of another, the model's own scaled to what the teacher
    leaves for all of them, the gradient with respect to the logits is temperature x (model - e).
    """

    @staticmethod
    def forward(
        context: Any, logits: torch.Tensor, choices: torch.Tensor, log_probabilities: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """``logits`` [rows, all choices]; ``choices``, int64, and their ``log_probabilities`` [rows, k]."""
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        for first in range(0, len(logits), ROWS):
            rows = slice(first, first + ROWS)
            found = torch.log_softmax(logits[rows].float() / temperature, dim=-1)
            known, likely = found.gather(1, choices[rows]), log_probabilities[rows].float()
            probable = likely.exp()
            left = [(1 - one.sum(dim=1, keepdim=True)).clamp(min=LEAST_LEFT) for one in (probable, known.exp())]
            total += (probable * (likely - known)).sum() + (left[0] * (left[0] / left[1]).log()).sum()
            expected = (found.exp() * (left[0] / left[1])).scatter(1, choices[rows], probable)
            gradient[rows] = ((found.exp() - expected) * temperature).to(gradient.dtype)
        context.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    def backward(context: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradients of the logits alone."""
        (gradient,) = context.saved_tensors
        return gradient * outer, None, None, None


def taught_loss(objective: Objective, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The loss of ``objective.distillation``, a scalar, by the teacher's likeliest choices in ``batch``."""
    section = objective.distillation
    assert section is not None
    logits = objective.logits(model, batch)
    rows, targets = objective.choices(logits, batch["targets"])
    counted = targets != IGNORED
    choices, likely = (batch[f"teacher_{name}"].flatten(0, 1)[counted] for name in ("choices", "log_probabilities"))
    total = section.logits * CoarseDivergence.apply(rows[counted], choices.long(), likely, section.temperature)
    if section.targets:
        total = total + section.targets * objective.training_loss(logits, batch["targets"])
    return total


def distilled_loss(
    objective: Objective, model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch
) -> torch.Tensor:
    """The loss of ``objective.distillation``, a scalar."""
    section = objective.distillation
    assert section is not None
    shown = {"output_hidden_states": bool(section.hidden), "output_attentions": bool(section.attention)}
    logits, student = _passed(objective, model, batch, shown)
    with torch.no_grad():
        expected, taught = _passed(objective, teacher, batch, shown)
    rows, targets = objective.choices(logits, batch["targets"])
    counted = targets != IGNORED
    total = rows.new_zeros((), dtype=torch.float32)
    if section.logits:
        others, _ = objective.choices(expected, batch["targets"])
        total = total + section.logits * SoftenedDivergence.apply(rows[counted], others[counted], section.temperature)
    if section.targets:
        total = total + section.targets * objective.training_loss(logits, batch["targets"])
    for name, weight, difference in (
        ("hidden_states", section.hidden, _hidden_difference),
        ("attentions", section.attention, _attention_difference),
    ):
        if weight:
            total = total + weight * _of_layers(name, difference, student, taught, section.layer_map, batch)
    return total


def _passed(
    objective: Objective, model: PreTrainedModel, batch: Batch, shown: dict[str, bool]
) -> tuple[torch.Tensor, Any]:
    """The logits, and all that the model's pass gives."""
    given: list[Any] = []

    def ask(module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, named | {name: True for name, wanted in shown.items() if wanted}

    hooks = [
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(lambda module, arguments, output: given.append(output)),
    ]
    try:
        return objective.logits(model, batch), given[-1]
    finally:
        for hook in hooks:
            hook.remove()


def _of_layers(
    name: str, difference: Any, student: Any, teacher: Any, layer_map: Sequence[int] | None, batch: Batch
) -> torch.Tensor:
    """Mean over the layers, of an encoder and of a decoder alike."""
    weights = (batch["targets"] != IGNORED).flatten(1).sum(dim=1)
    totals = []
    for side in ("", "encoder_", "decoder_"):
        found, expected = getattr(student, f"{side}{name}", None), getattr(teacher, f"{side}{name}", None)
        if found is None or expected is None:
            continue
        if name == "hidden_states":
            # The first is the embedding's.
            found, expected = found[1:], expected[1:]
        places = layer_map or evenly(len(expected), len(found))
        present = batch.get("attention_mask") if side != "decoder_" else None
        each = [
            (difference(one, expected[place], present) * weights).sum()
            for one, place in zip(found, places, strict=True)
        ]
        totals.append(torch.stack(each).mean())
    return torch.stack(totals).sum()


def _hidden_difference(found: torch.Tensor, expected: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """[batch] from states [batch, time, width]: the mean over the tokens of each text."""
    each = (found.float() - expected.float()).square().mean(dim=-1)
    if present is None:
        return each.mean(dim=1)
    return (each * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)


def _attention_difference(found: torch.Tensor, expected: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """[batch] from probabilities [batch, heads, time, time]: the mean over the tokens of each text of the summed
    difference, as most of the probabilities of a long text are next to nothing."""
    each = (found.float() - expected.float()).square().sum(dim=-1).mean(dim=1)
    if present is None:
        return each.mean(dim=1)
    return (each * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
