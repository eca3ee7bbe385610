"""Weights that were zero when a run began stay zero: training of a model that was pruned."""

from __future__ import annotations

import torch

from raylm.models.weights import Weights
from raylm.parallel.layout.fragments import Fragment
from raylm.parallel.layout.slicing import Offset


class KeepZeros:
    """Called after each optimizer step with this rank's fragments of the fp32 weights.

    Args:
        weights: what the run began with, also where it goes on from a checkpoint.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._masks: dict[tuple[str, Offset, tuple[int, ...]], torch.Tensor | None] = {}

    @torch.no_grad()
    def __call__(self, fragments: list[Fragment]) -> None:
        for fragment in fragments:
            if (mask := self._mask(fragment)) is not None:
                fragment.tensors["weight"].masked_fill_(mask, 0.0)

    def _mask(self, fragment: Fragment) -> torch.Tensor | None:
        """Where the fragment is to be zero; None where no matrix has a zero."""
        weight = fragment.tensors["weight"]
        key = (fragment.name, fragment.offset, tuple(weight.shape))
        if weight.dim() < 2:
            return None
        if key not in self._masks:
            part = tuple(
                slice(first, first + length) for first, length in zip(fragment.offset, weight.shape, strict=True)
            )
            zero = self._weights.open(fragment.name)[part] == 0
            self._masks[key] = zero.to(weight.device) if bool(zero.any()) else None
        return self._masks[key]
