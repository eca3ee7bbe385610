"""What the ranks must agree on while they train, settled about once a second: to save, to stop, to leave.

One small all-reduce; rank 0 says after how many steps the next one comes, from the speed of the last ones, so that fast
steps do not pay for it.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

SECONDS = 1.0
MOST_STEPS = 1000


class Agreement:
    """Call :meth:`exchange` at the steps at which it is :meth:`due`, on every rank."""

    def __init__(self, rank: int, step: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._last, self._next, self._at = step, step + 1, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the ranks meet after ``step``."""
        return step >= self._next

    def exchange(self, step: int, notice: int, save: bool) -> tuple[int, bool]:
        """The greatest ``notice`` of all ranks, and whether rank 0 wants to ``save``; a collective."""
        now = time.monotonic()
        pace = (step - self._last) / max(1e-9, now - self._at)
        ahead = min(MOST_STEPS, max(1, round(pace * SECONDS)))
        mine = [notice, int(save), ahead] if self._rank == 0 else [notice, 0, 0]
        agreed = torch.tensor(mine, device=self._device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        greatest, wanted, ahead = agreed.tolist()
        self._last, self._next, self._at = step, step + ahead, now
        return greatest, bool(wanted)


def gather_names(mine: list[str]) -> list[str]:
    """The ranks' lists joined, the same on all; a collective."""
    lists: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(lists, mine)
    return sorted({name for one in lists for name in one})
