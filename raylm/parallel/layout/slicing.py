"""Which part of a whole parameter a tensor-parallel rank holds, and where a flat range of that part lies in the whole.

A :class:`Slicing` names the ranges of one dimension that a rank holds, end to end (three for the fused query, key and
value matrix of GPT-2, else one). ZeRO cuts what a rank holds into flat ranges; :func:`boxes` finds the rectangles of
the whole parameter that such a range covers, which is how checkpoints name them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from raylm.models.weights import Sliceable

Offset = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slicing:
    """The part of a parameter that a rank holds.

    Attributes:
        shape: shape of the whole parameter.
        dimension: the dimension that is cut; None where nothing is.
        ranges: (first, stop) of each range of that dimension, in the order in which the rank holds them.
    """

    shape: Shape
    dimension: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def local_shape(self) -> Shape:
        """Shape of what the rank holds."""
        if self.dimension is None:
            return self.shape
        cut = list(self.shape)
        cut[self.dimension] = sum(stop - first for first, stop in self.ranges)
        return tuple(cut)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of the ``whole`` parameter, as a new tensor."""
        return whole.clone() if self.dimension is None else self.read(whole)

    def read(self, whole: Sliceable) -> torch.Tensor:
        """The rank's part of a ``whole`` that may lie in a file; reads no more than it."""
        if self.dimension is None:
            return whole[...]
        before = (slice(None),) * self.dimension
        return torch.cat([whole[(*before, slice(first, stop))] for first, stop in self.ranges], self.dimension)


def cut_evenly(shape: Shape, dimension: int, rank: int, size: int, parts: int = 1) -> Slicing:
    """The ``rank``-th of ``size`` nearly equal parts of ``dimension``, of each of ``parts`` matrices side by side."""
    length = shape[dimension] // parts
    per_rank = -(-length // size)
    first, stop = min(rank * per_rank, length), min((rank + 1) * per_rank, length)
    return Slicing(shape, dimension, tuple((part * length + first, part * length + stop) for part in range(parts)))


def _rectangles(shape: Shape, start: int, stop: int) -> Iterator[tuple[Offset, Shape]]:
    """The flat range ``start`` to ``stop`` of a tensor as rectangles, each of which is contiguous, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:  # within one row
        row = start // inner
        yield from _in_row(shape, row, start - row * inner, stop - row * inner)
        return
    if start < first * inner:
        yield from _in_row(shape, first - 1, start - (first - 1) * inner, inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * inner < stop:
        yield from _in_row(shape, last, 0, stop - last * inner)


def _in_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[Offset, Shape]]:
    for offset, size in _rectangles(shape[1:], start, stop):
        yield (row, *offset), (1, *size)


def boxes(slicing: Slicing, start: int, stop: int) -> Iterator[tuple[Offset, Shape, int, tuple[slice, ...]]]:
    """The flat range ``start`` to ``stop`` of what a rank holds, as rectangles of the whole parameter.

    Yields:
        (offset in the whole, shape of the contiguous local rectangle, its first element counted from ``start``, the
        part of that rectangle meant).
    """
    position = 0
    for offset, shape in _rectangles(slicing.local_shape, start, stop):
        everything = tuple(slice(0, length) for length in shape)
        if slicing.dimension is None:
            yield offset, shape, position, everything
        else:
            dimension, held = slicing.dimension, 0
            low, high = offset[dimension], offset[dimension] + shape[dimension]
            for first, end in slicing.ranges:
                length = end - first
                begin, until = max(low, held), min(high, held + length)
                if begin < until:
                    where = list(offset)
                    where[dimension] = first + begin - held
                    part = list(everything)
                    part[dimension] = slice(begin - low, until - low)
                    yield tuple(where), shape, position, tuple(part)
                held += length
        position += prod(shape)
