"""A loss of the user's own, by its import path.

In: the ``objective`` section, whose ``loss`` is ``module:attribute``. Out: :class:`OwnLoss`. The function gives a loss
for each target; the sum is made here, as of every loss, so that it does not depend on how a batch is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm.config.model import ObjectiveSection
from raylm.data.samples.token_samples import IGNORED
from raylm.errors import RunFailure, UserError
from raylm.models.own_code import import_attribute, told

if TYPE_CHECKING:
    import torch

KEY = "objective.loss"
# Targets of the example that a loss is tried on, at least; as many as there are labels where those are more.
TRIED = 4


@dataclass(frozen=True)
class OwnLoss:
    """A loss from outside.

    Attributes:
        name: its import path.
        function: from logits fp32 [n, choices] and targets int64 [n] to losses [n].
    """

    name: str
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def summed(self, rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over counted targets, a scalar.

        Args:
            rows: logits [rows, choices].
            targets: int64 [rows]; the function never sees rows where it is :data:`IGNORED`.
            weights: fp32 [choices], by which each loss is multiplied.

        Raises:
            RunFailure: the function gives something else than a loss for each target.
        """
        counted = targets != IGNORED
        rows, targets = rows[counted].float(), targets[counted]
        if not len(targets):
            # What fills up a batch: zero, with a gradient, which ZeRO waits for on all ranks.
            return rows.sum()
        each = self.function(rows, targets)
        if refusal := _refusal(each, len(targets)):
            raise RunFailure(f"{KEY}: {self.name} returned {refusal}")
        each = each.float()
        return (each if weights is None else each * weights[targets]).sum()


def load_loss(section: ObjectiveSection) -> OwnLoss:
    """Import ``section.loss``; its module may be in ``section.imports_from``, which comes last on Python's path.

    Raises:
        UserError: there is no such module or attribute, or it cannot be called.
    """
    name = str(section.loss)
    found = import_attribute(name, KEY, section.imports_from)
    if not callable(found):
        kind = type(found).__name__
        raise UserError(f"{KEY}: found '{name}' of type {kind}, allowed: a function of logits and targets, or a class")
    return OwnLoss(name, _made(name, found, section.loss_options))


def _made(name: str, found: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """The function itself, with its options; an instance of a class."""
    from torch import nn

    if not isinstance(found, type):
        return functools.partial(found, **options) if options else found
    try:
        made = found(**options)
    except Exception as error:  # whatever a class of the user's raises
        raise UserError(
            f"objective.loss_options: found {options}, which {name} does not take: {told(error)}"
        ) from error
    if not callable(made):
        raise UserError(
            f"{KEY}: found '{name}', whose instances cannot be called, allowed: those of logits and targets"
        )
    if isinstance(made, nn.Module) and any(True for _ in made.parameters()):
        raise UserError(f"{KEY}: found '{name}', which has parameters of its own, allowed: none; they are not trained")
    return made


def check_loss(loss: OwnLoss, choices: int) -> None:
    """Try the loss on example logits and targets of so many ``choices``, forward and backward.

    Raises:
        UserError: it fails, or gives something else than a finite loss for each target.
    """
    import torch

    count = max(TRIED, choices)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, choices, generator=generator, requires_grad=True)
    targets = torch.arange(count) % choices
    tried = f"{KEY}: {loss.name} on {count} example logits [{count}, {choices}] and targets [{count}]"
    try:
        each = loss.function(logits, targets)
    except Exception as error:  # whatever a function of the user's raises
        raise UserError(f"{tried}: {told(error)}") from error
    if refusal := _refusal(each, count):
        raise UserError(f"{tried} returned {refusal}")
    if not torch.isfinite(each).all():
        raise UserError(f"{tried} returned a loss that is not finite")
    if not each.requires_grad:
        raise UserError(f"{tried} returned losses without a gradient, allowed: those that follow from the logits")
    try:
        each.sum().backward()
    except Exception as error:  # as above
        raise UserError(f"{tried} has no backward pass: {told(error)}") from error


def _refusal(each: Any, count: int) -> str:
    """What is wrong with what a loss gave for ``count`` targets; empty where nothing is."""
    import torch

    allowed = f"allowed: a tensor of a loss for each target, [{count}]"
    if not isinstance(each, torch.Tensor):
        return f"a {type(each).__name__}, {allowed}"
    if tuple(each.shape) != (count,):
        hint = " (reduction='none')" if not each.dim() else ""
        return f"the shape {list(each.shape)}, {allowed}{hint}"
    return "" if each.is_floating_point() else f"{each.dtype}, {allowed}"
