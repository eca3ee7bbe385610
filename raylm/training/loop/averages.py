"""A moving average of the weights (Polyak and Juditsky 1992; in this form Tarvainen and Valpola 2017,
arXiv:1703.01780), which is evaluated and exported in their place.

Every rank averages the fp32 weights that it has, in the rectangles in which it has them, whatever the layout and ZeRO
stage: the average costs as much memory as one of AdamW's moments, and no communication. In checkpoints it lies beside
the moments.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch

from raylm.config.training import EmaSection
from raylm.parallel.engines.base import Engine
from raylm.parallel.layout.fragments import Fragment
from raylm.parallel.layout.slicing import Offset
from raylm.training.checkpoints.store import CheckpointReader

KIND = "average"


def decay_at(section: EmaSection, step: int) -> float:
    """Share of the average that stays in the ``step``-th update, counted from 1."""
    return min(section.decay, (1 + step) / (10 + step)) if section.warmup else section.decay


class Averages:
    """The averages of what one rank trains; they begin as the weights.

    Args:
        engine: whose weights are averaged.
    """

    @torch.no_grad()
    def __init__(self, section: EmaSection, engine: Engine) -> None:
        self._section, self._engine = section, engine
        # Of what several ranks hold, each averages its own copy, so that each can take the averages in its place.
        self._live = [f for f in engine.fragments(for_loading=True) if engine.parameters[f.name].requires_grad]
        self._averages = [fragment.tensors["weight"].detach().clone() for fragment in self._live]
        self._of: dict[str, list[tuple[Offset, torch.Tensor]]] = defaultdict(list)
        for fragment, average in zip(self._live, self._averages, strict=True):
            self._of[fragment.name].append((fragment.offset, average))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the ``step``-th step, counted from 1."""
        share = 1 - decay_at(self._section, step)
        for fragment, average in zip(self._live, self._averages, strict=True):
            average.lerp_(fragment.tensors["weight"], share)

    def with_averages(self, fragments: list[Fragment]) -> list[Fragment]:
        """``fragments`` with views of the averages in them, for a checkpoint to write or to fill."""
        for fragment in fragments:
            if (average := self._part(fragment)) is not None:
                fragment.tensors[KIND] = average
        return fragments

    def _part(self, wanted: Fragment) -> torch.Tensor | None:
        """The average in the rectangle of a fragment; None of what is not trained."""
        shape = wanted.tensors["weight"].shape
        for offset, average in self._of.get(wanted.name, ()):
            first = [there - here for there, here in zip(wanted.offset, offset, strict=True)]
            stop = [low + size for low, size in zip(first, shape, strict=True)]
            if min(first) >= 0 and all(high <= size for high, size in zip(stop, average.shape, strict=True)):
                return average[tuple(slice(low, high) for low, high in zip(first, stop, strict=True))]
        assert not self._engine.parameters[wanted.name].requires_grad, f"no average of {wanted.name} at {wanted.offset}"
        return None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model computes with the averages; a collective at both ends. No checkpoint may be under
        way. Afterwards the weights are the same bits again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for fragment, average in zip(self._live, self._averages, strict=True):
            kept = average.clone()
            average.copy_(fragment.tensors["weight"])
            fragment.tensors["weight"].copy_(kept)
        self._engine.refresh()


class AveragedWeights:
    """The averages of a checkpoint, one after the other, and of what has none the weights; see
    :class:`raylm.training.checkpoints.export.ExportedWeights`."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader, self.shapes = reader, reader.shapes

    def weight(self, name: str) -> torch.Tensor:
        """A whole weight, fp32."""
        return self._reader.weight(name, KIND if self._reader.has(KIND, name) else "weight")
