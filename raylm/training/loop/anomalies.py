"""Gradients that are not finite and losses that jump: finding them, and leaving batches out.

A step is judged after its update; the policies skip and roll_back go back to the last checkpoint and on from there
without the batch, which repeats the steps in between bit for bit and works under any layout. Which batch a step takes
is a function of the step and of the ranges left out, which a checkpoint's state holds.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from raylm.config.training import AnomaliesSection

Ranges = list[list[int]]


def batch_of_step(step: int, skipped: Ranges) -> int:
    """Number of the batch that ``step`` takes, where those in ``skipped`` ([first, stop), sorted) are left out."""
    for first, stop in skipped:
        if step >= first:
            step += stop - first
    return step


def leave_out(skipped: Ranges, first: int, stop: int) -> Ranges:
    """``skipped`` with the batches from ``first`` to ``stop`` (exclusive) added, sorted and merged."""
    merged: Ranges = []
    for low, high in sorted([*skipped, [first, stop]]):
        if merged and low <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return merged


def find_anomaly(section: AnomaliesSection, state: dict[str, Any], gradient_norm: float, loss: float) -> str | None:
    """What is wrong with a step, or None; notes its loss in ``state["recent_losses"]`` where spikes are looked for.

    Args:
        gradient_norm: before clipping; DeepSpeed gives -1 where it is not finite.
        loss: of the whole batch; looked at only under ``spike_factor``.
    """
    if not math.isfinite(gradient_norm) or gradient_norm < 0:
        return "the gradient is not finite"
    if section.spike_factor is None:
        return None
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    recent = state.setdefault("recent_losses", [])
    if len(recent) == section.window and loss > section.spike_factor * (median := statistics.median(recent)):
        return f"the loss is {loss:.4g}, {loss / median:.3g} times the median of the last {section.window} steps"
    recent.append(loss)
    del recent[: -section.window]
    return None
