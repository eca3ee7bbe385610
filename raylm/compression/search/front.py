"""Which of several models are best in some respect, and which of these is taken.

In: a row a model, with the figures that the search minimises. Out: the rows of the Pareto front, and one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raylm.config.compression import TargetSection

Row = dict[str, Any]


def pareto_front(rows: Sequence[Row], objectives: Sequence[str]) -> list[Row]:
    """The rows that no other one is at least as good as in every figure and better in one; smaller is better."""
    return [row for row in rows if not any(_dominates(other, row, objectives) for other in rows)]


def _dominates(one: Row, other: Row, objectives: Sequence[str]) -> bool:
    pairs = [(one[name], other[name]) for name in objectives]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def keeps_to(row: Row, target: TargetSection | None) -> bool:
    """Whether a model is as small and as fast as it has to be."""
    limits = {} if target is None else target.model_dump(exclude_none=True)
    return all(row[name] <= limit for name, limit in limits.items())


def pick(front: Sequence[Row], objectives: Sequence[str], target: TargetSection | None) -> Row | None:
    """The row of the front that is taken: with a target the one of best quality that keeps to it, else the one that is
    nearest to the best of all figures, each as its share of the way from the front's best to its worst.

    Returns:
        None where none keeps to the target.
    """
    if target is not None:
        kept = [row for row in front if keeps_to(row, target)]
        return min(kept, key=lambda row: row["quality"]) if kept else None
    best = {name: min(row[name] for row in front) for name in objectives}
    width = {name: max(row[name] for row in front) - best[name] or 1.0 for name in objectives}
    return min(front, key=lambda row: sum(((row[name] - best[name]) / width[name]) ** 2 for name in objectives))
