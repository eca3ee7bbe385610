"""What a member does between two turns: whose checkpoint it takes over, and how the values are changed (Jaderberg et
al. 2017, sections 3 and 4.1.1: truncation selection, and perturbing or resampling)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raylm.config.distributions import Distribution, Point, in_order, is_active, same
from raylm.config.tuning import TuningSection
from raylm.tuning.population.state import Population
from raylm.tuning.space import drawn

if TYPE_CHECKING:
    import numpy as np

# The share of the members that takes over, and of those from which.
SHARE = 4
FACTORS = (0.8, 1.2)


def generator_of(seed: int, turn: int) -> np.random.Generator:
    """What decides after a turn: a function of the seed and the turn, so that it is the same after an interrupt."""
    import numpy as np

    return np.random.default_rng([seed, turn])


def chosen(
    population: Population, metric: str, generator: np.random.Generator, *, minimised: bool, exploits: bool
) -> list[tuple[int, int]]:
    """Who takes over from whom.

    The last quarter of the members take over from the first quarter of those that live, at least one from one. Members
    that have failed come last, and all of them take over.

    Args:
        exploits: whether members that live take over as well.

    Returns:
        Pairs of a member and its donor, by the member's number.
    """
    members, sign = population.members, 1 if minimised else -1
    alive = [number for number, member in enumerate(members) if member.failure is None]
    ranked = sorted(alive, key=lambda number: (sign * members[number].figures[metric], number))
    failed = [number for number, member in enumerate(members) if member.failure is not None]
    quarter = max(1, len(members) // SHARE)
    first = ranked[: min(quarter, max(1, len(ranked) // 2))]
    behind = max(0, quarter - len(failed)) if exploits else 0
    rest = ranked[len(first) :]
    taking = sorted([*failed, *rest[len(rest) - min(behind, len(rest)) :]])
    return [(number, first[int(generator.integers(len(first)))]) for number in taking] if first else []


def explored(tuning: TuningSection, point: Point, generator: np.random.Generator) -> Point:
    """The ``point`` with each value changed; a key that others make active is drawn."""
    found: Point = {}
    for key in in_order(tuning.space):
        distribution = tuning.space[key]
        if not is_active(distribution, found):
            continue
        anew = generator.random() < tuning.resample_probability
        if anew or key not in point:
            found[key] = drawn(distribution, generator)
        else:
            found[key] = perturbed(distribution, point[key], generator)
    return found


def perturbed(distribution: Distribution, value: Any, generator: np.random.Generator) -> Any:
    """A value near the ``value``: a number times 0.8 or 1.2, within its range; of a list a neighbour.

    Where a range has steps the value moves by one at least.
    """
    up = bool(generator.integers(2))
    values = distribution.choice or distribution.grid
    if values is not None:
        place = next(number for number, one in enumerate(values) if same(one, value))
        beside = [there for there in (place - 1, place + 1) if 0 <= there < len(values)]
        return values[beside[up % len(beside)]] if beside else value
    assert distribution.bounds is not None
    low, high = distribution.bounds
    moved = min(high, max(low, value * FACTORS[up]))
    if (steps := distribution.listed) is None:
        return moved
    width = distribution.step or 1
    place, there = (round((number - low) / width) for number in (value, moved))
    if there == place:
        # Below zero a smaller factor leads up.
        there += 1 if up == (value >= 0) else -1
    return steps[max(0, min(len(steps) - 1, there))]
