"""Rectangles of flat ranges: every element of the whole parameter is found once, where it belongs."""

from __future__ import annotations

import pytest
import torch

from raylm.parallel.layout.slicing import Slicing, boxes, cut_evenly


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 3, 5), (12, 1)])
@pytest.mark.parametrize("dimension", [None, 0, 1])
@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_flat_ranges_of_all_ranks_cover_the_whole_once(shape, dimension, size, parts) -> None:
    if dimension is not None and (dimension >= len(shape) or shape[dimension] % parts):
        pytest.skip("no such cut")
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    rebuilt, counts = torch.zeros_like(whole), torch.zeros_like(whole)
    for rank in range(size if dimension is not None else 1):
        slicing = Slicing(shape) if dimension is None else cut_evenly(shape, dimension, rank, size, parts)
        held = slicing.take(whole)
        assert tuple(held.shape) == slicing.local_shape
        flat = held.reshape(-1)
        for start in range(0, flat.numel(), 4):  # as ZeRO cuts it
            stop = min(start + 4, flat.numel())
            piece = flat[start:stop]
            for offset, size_of_box, first, inside in boxes(slicing, start, stop):
                count = torch.Size(size_of_box).numel()
                values = piece[first : first + count].view(size_of_box)[inside]
                where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                rebuilt[where] = values
                counts[where] += 1
    assert torch.equal(rebuilt, whole)
    assert torch.equal(counts, torch.ones_like(whole))
