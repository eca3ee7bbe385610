"""The search space of ``tuning.space``: what each key may be, and which keys a point of the space has.

A point is a dictionary from dotted key to value. A key with ``when`` is in it only where other keys have the values
that it names. Knows neither Ray nor NumPy; drawing is in :mod:`raylm.tuning.space`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from raylm.config.base import Section

Point = dict[str, Any]
KINDS = ("choice", "grid", "uniform", "log_uniform", "integer")
RANGES = ("uniform", "log_uniform", "integer")


class Distribution(Section):
    """One dimension of a search space; exactly one of choice, grid, uniform, log_uniform and integer is given."""

    choice: list[Any] | None = Field(default=None, min_length=1)
    """Values to draw from."""
    grid: list[Any] | None = Field(default=None, min_length=1)
    """Values that are all tried."""
    uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """Bounds of a uniform distribution."""
    log_uniform: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """Bounds of a distribution that is uniform in the logarithm."""
    integer: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """Smallest and largest integer."""
    step: float | None = Field(default=None, gt=0, le=1e30)
    """uniform, log_uniform and integer: only the lower bound and what is whole steps above it."""
    when: dict[str, Any] | None = Field(default=None, min_length=1)
    """Other keys of the space, each with a value or a list of values: this key is drawn only where all of them have
    theirs, and else stays what the file says."""

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; found: {given or 'none'}")
        for name in RANGES:
            bounds = getattr(self, name)
            if bounds and bounds[0] >= bounds[1]:
                raise ValueError(f"{name}: found {bounds}, allowed: [low, high] with low < high")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform: found {self.log_uniform}, allowed: bounds above 0")
        if self.step is None:
            return self
        if (bounds := self.bounds) is None:
            raise ValueError(f"step: found {self.step:g} with {given[0]}, allowed with: {', '.join(RANGES)}")
        if self.step > bounds[1] - bounds[0]:
            raise ValueError(f"step: found {self.step:g}, allowed: at most {bounds[1] - bounds[0]:g}, as the range is")
        if self.integer and self.step != int(self.step):
            raise ValueError(f"step: found {self.step:g}, allowed with integer: a whole number")
        return self

    @property
    def bounds(self) -> Sequence[float] | None:
        """Of a range."""
        return self.uniform or self.log_uniform or self.integer

    @property
    def listed(self) -> Sequence[Any] | None:
        """The values one by one; None of a range of real numbers without a step. Of a range nothing is made yet."""
        if (values := self.choice or self.grid) is not None:
            return values
        if self.integer is not None:
            return range(self.integer[0], self.integer[1] + 1, int(self.step or 1))
        return None if self.step is None else _Steps(self.bounds, self.step)  # type: ignore[arg-type]

    def snapped(self, value: float) -> float:
        """The value of the range that is nearest to ``value``."""
        if self.step is None:
            return value
        values = self.listed
        assert values is not None and self.bounds is not None
        return values[max(0, min(len(values) - 1, round((value - self.bounds[0]) / self.step)))]

    def has(self, value: Any) -> bool:
        """Whether the distribution can give the ``value``."""
        if (values := self.choice or self.grid) is not None:
            return any(same(value, one) for one in values)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.bounds  # type: ignore[misc]
        if self.integer is not None and not isinstance(value, int):
            return False
        return low <= value <= high and math.isclose(self.snapped(value), value, rel_tol=1e-9, abs_tol=1e-12)

    def described(self) -> str:
        """The distribution as a message names it."""
        return next(f"{name} {getattr(self, name)}" for name in KINDS if getattr(self, name) is not None)


class _Steps(Sequence[float]):
    """The real numbers of a range with a step; written as short as they were given."""

    def __init__(self, bounds: Sequence[float], step: float) -> None:
        self._low, self._step = bounds[0], step
        self._count = int((bounds[1] - bounds[0]) / step + 1e-9) + 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if not -self._count <= place < self._count:
            raise IndexError(place)
        return float(f"{self._low + place % self._count * self._step:.12g}")


def same(one: Any, other: Any) -> bool:
    """Whether two values of a file are the same; ``true`` is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def is_active(distribution: Distribution, point: Mapping[str, Any], apart_from: Collection[str] = ()) -> bool:
    """Whether a key of this distribution is drawn beside the ``point``, which has those keys that it depends on.

    Args:
        apart_from: keys that are not looked at.
    """
    return all(
        key in point and any(same(point[key], value) for value in _wanted(values))
        for key, values in (distribution.when or {}).items()
        if key not in apart_from
    )


def _wanted(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def in_order(space: Mapping[str, Distribution]) -> list[str]:
    """The keys, each behind those that it depends on.

    Raises:
        ValueError: a ``when`` names what is no key or no value of the space, or leads back to itself.
    """
    for key, distribution in space.items():
        for other, values in (distribution.when or {}).items():
            if other not in space or other == key:
                rest = ", ".join(name for name in space if name != key) or "none"
                raise ValueError(f"space.{key}.when: found '{other}', allowed: another key of the space ({rest})")
            for value in _wanted(values):
                if not space[other].has(value):
                    raise ValueError(
                        f"space.{key}.when.{other}: found {value!r}, allowed: a value of {space[other].described()}"
                    )
    found: list[str] = []
    while len(found) < len(space):
        ready = [key for key in space if key not in found and set(space[key].when or ()) <= set(found)]
        if not ready:
            circle = ", ".join(key for key in space if key not in found)
            raise ValueError(f"space: found keys whose 'when' lead back to themselves ({circle}), allowed: no circle")
        found.append(ready[0])
    return found


def grid_points(space: Mapping[str, Distribution], *, every: bool) -> Iterator[Point]:
    """Combinations of the values that are all tried; of the other keys nothing is in them, and any ``when`` that asks
    for one of these counts as fulfilled.

    Args:
        every: whether all keys are tried whose values can be listed; else those of a ``grid``.
    """

    def walk(keys: list[str], point: Point, undrawn: set[str]) -> Iterator[Point]:
        if not keys:
            yield point
            return
        key, *rest = keys
        distribution = space[key]
        values = distribution.listed if every or distribution.grid is not None else None
        if not is_active(distribution, point, apart_from=undrawn):
            yield from walk(rest, point, undrawn)
        elif values is None:
            yield from walk(rest, point, undrawn | {key})
        else:
            for value in values:
                yield from walk(rest, {**point, key: value}, undrawn)

    yield from walk(in_order(space), {}, set())


def count_points(space: Mapping[str, Distribution], most: int, *, every: bool) -> int:
    """How many :func:`grid_points` there are; above ``most`` they are not counted."""
    return sum(1 for _ in itertools.islice(grid_points(space, every=every), most + 1))


def corners(space: Mapping[str, Distribution]) -> list[Point]:
    """Points that have each value, or each end of a range, at least once, beside the first ones of the other keys.

    A key with ``when`` has its values beside those of the others that it asks for.
    """
    ends = {key: list(d.choice or d.grid or d.bounds or ()) for key, d in space.items()}
    order = in_order(space)

    def point(fixed: Point) -> Point:
        found: Point = {}
        for key in order:
            if is_active(space[key], found):
                found[key] = fixed.get(key, ends[key][0])
        return found

    def with_conditions(key: str, value: Any) -> Point:
        fixed = {key: value}
        for other, values in (space[key].when or {}).items():
            fixed |= with_conditions(other, _wanted(values)[0])
        return fixed

    found = [point({})]
    for key, values in ends.items():
        for value in values:
            one = point(with_conditions(key, value))
            if one not in found:
                found.append(one)
    return found
