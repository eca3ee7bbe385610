"""Zeros of a pruned model stay zero whatever the part of a matrix that a rank holds."""

from __future__ import annotations

import torch

from raylm.parallel.layout.fragments import Fragment
from raylm.training.loop.zeros import KeepZeros


class Held:
    """Weights by name."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights, self.opened = weights, 0

    def open(self, name: str) -> torch.Tensor:
        self.opened += 1
        return self.weights[name]


def test_zeros_stay_in_every_part() -> None:
    whole = torch.arange(24.0).view(4, 6)
    whole[1, 2:5] = 0.0
    held = Held({"matrix": whole, "dense": whole + 1, "norm": torch.zeros(6)})
    keep = KeepZeros(held)
    parts = [
        Fragment("matrix", (4, 6), (0, 0), {"weight": torch.ones(2, 6)}),
        Fragment("matrix", (4, 6), (2, 0), {"weight": torch.ones(2, 6)}),
        Fragment("dense", (4, 6), (0, 0), {"weight": torch.ones(4, 6)}),
        # Norms and biases begin at zero, and are trained.
        Fragment("norm", (6,), (0,), {"weight": torch.ones(6)}),
    ]
    for _ in range(2):
        keep(parts)
    expected = (whole != 0).float()
    assert torch.equal(parts[0].tensors["weight"], expected[:2])
    assert torch.equal(parts[1].tensors["weight"], torch.ones(2, 6))
    assert all(bool((part.tensors["weight"] == 1).all()) for part in parts[2:])
    # Read once for each part.
    assert held.opened == 3
    parts[0].tensors["weight"].fill_(2.0)
    keep(parts)
    assert torch.equal(parts[0].tensors["weight"], 2 * expected[:2])
