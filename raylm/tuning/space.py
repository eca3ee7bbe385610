"""Points of a search space: drawn at random, listed as a grid, begun with, or taken from an earlier search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.distributions import Distribution, Point, grid_points, in_order, is_active, same
from raylm.config.run_directory import read_object
from raylm.config.tuning import TuningSection
from raylm.errors import UserError
from raylm.tasks.measures import measure_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Known:
    """A trial of an earlier search.

    Attributes:
        values: of what the search is about, in the order of its metrics.
        step: at which it was stopped early; None of one that came to its end.
    """

    point: Point
    values: list[float]
    step: int | None


def is_minimised(tuning: TuningSection) -> bool:
    """Whether a smaller ``tuning.metric`` is better."""
    if tuning.direction != "auto":
        return tuning.direction == "min"
    measure = measure_of(str(tuning.metric))
    return measure is None or measure.better == "smaller"


def drawn(distribution: Distribution, generator: np.random.Generator) -> Any:
    """One value."""
    if distribution.log_uniform is not None:
        low, high = distribution.log_uniform
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
        return distribution.snapped(min(high, max(low, value)))
    if (values := distribution.listed) is not None:
        return values[int(generator.integers(len(values)))]
    assert distribution.uniform is not None
    return float(generator.uniform(*distribution.uniform))


def draw_candidates(tuning: TuningSection, seed: int, first: list[Point] | None = None) -> list[Point]:
    """The points that the searchers random and grid try, in order; a pure function of ``seed`` and ``first``.

    Args:
        first: those that are tried first, in place of as many draws; by default those of ``tuning.start``.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    every = tuning.searcher == "grid"
    once = every or all(distribution.grid is not None for distribution in tuning.space.values())
    drawn_points = [point for _ in range(1 if once else tuning.trials) for point in _variants(tuning, every, generator)]
    if every and tuning.scheduler != "none":
        # In the order of the file, rates would rise from trial to trial: those to stop would be ahead when they come.
        generator.shuffle(drawn_points)
    found = [completed(tuning, point, generator) for point in (tuning.start if first is None else first)]
    if once:
        found += [point for point in drawn_points if not any(_alike(point, other) for other in found)]
    else:
        found += drawn_points[: max(0, len(drawn_points) - len(found))]
    return found[: tuning.budget.trials]


def most_trials(tuning: TuningSection, first: int) -> int:
    """How many trials a searcher that learns is to try.

    Args:
        first: points that are tried in any case.
    """
    return min(max(tuning.trials, first), tuning.budget.trials or tuning.trials + first)


def completed(tuning: TuningSection, point: Point, generator: np.random.Generator) -> Point:
    """The ``point`` with the keys that it leaves out drawn."""
    found: Point = {}
    for key in in_order(tuning.space):
        if is_active(tuning.space[key], found):
            found[key] = point[key] if key in point else drawn(tuning.space[key], generator)
    return found


def _variants(tuning: TuningSection, every: bool, generator: np.random.Generator) -> Iterator[Point]:
    """A point for each combination of the values that are all tried, the rest drawn."""
    for fixed in grid_points(tuning.space, every=every):
        yield completed(tuning, fixed, generator)


def _alike(one: Point, other: Point) -> bool:
    return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())


def earlier_trials(tuning: TuningSection, metrics: list[str]) -> list[Known]:
    """The trials of the search at ``tuning.start_from`` that are points of this space, with their figures.

    Args:
        metrics: keys of a trial's figures in the report.

    Raises:
        UserError: there is no report of a search, or no such trial in it.
    """
    if tuning.start_from is None:
        return []
    place = Path(tuning.start_from).expanduser()
    report = read_object(place / "report.json") if place.is_dir() else None
    if report is None or not isinstance(report.get("trials"), list):
        raise UserError(
            f"tuning.start_from: found {tuning.start_from}, allowed: the run directory of a search that is done"
        )
    found = []
    for row in report["trials"]:
        point = {key: row[key] for key in tuning.space if row.get(key) is not None}
        values = [row.get(name) for name in metrics]
        numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        if row.get("status") == "failed" or not numbers or not point or tuning.point_refusal(point):
            continue
        if completed_by_itself(tuning, point):
            found.append(Known(point, values, row.get("step") if row.get("status") == "stopped" else None))
    if not found:
        raise UserError(
            f"tuning.start_from: found {tuning.start_from}, none of whose trials is a point of tuning.space with "
            f"{', '.join(metrics)}; allowed: a search over the same keys"
        )
    return found


def completed_by_itself(tuning: TuningSection, point: Point) -> bool:
    """Whether a ``point`` has all keys that it can have."""
    keys = [key for key in in_order(tuning.space) if is_active(tuning.space[key], point)]
    return set(keys) == set(point)
