"""A population and where it stands, in ``<run>/population.json``, which is written whole or not at all.

Its members go forward in turns. What is decided between two turns follows from the seed and from what is written here:
a search that was killed decides the same again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylm.config.distributions import Point
from raylm.config.run_directory import read_object, write_atomically
from raylm.errors import UserError

STATE = "population.json"


@dataclass(frozen=True)
class Takeover:
    """A member went on from another's checkpoint.

    Attributes:
        step: at which.
        donor: the member whose checkpoint it was.
        values: with which the member went on.
        failure: what the member had failed with, if it had.
    """

    step: int
    donor: int
    values: Point
    failure: str | None = None


@dataclass
class Member:
    """One member.

    Attributes:
        values: that it trains with.
        first: values that it began with.
        turns: how many it has made; one that failed counts.
        step: to which it has trained.
        tokens: on which its weights were trained.
        figures: of its last evaluation, by name.
        failure: why it has failed; None of one that lives.
        finished: whether its weights are exported.
    """

    values: Point
    first: Point
    turns: int = 0
    step: int = 0
    tokens: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    finished: bool = False
    takeovers: list[Takeover] = field(default_factory=list)


@dataclass
class Population:
    """All members.

    Attributes:
        turn: the one that is made, from 0.
        tokens: that all members have trained on.
        seconds: of searching so far.
        ended: whether it ended where it stood, as its budget was used up.
    """

    members: list[Member]
    turn: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ended: bool = False

    def due(self) -> list[int]:
        """The members that have not made the turn yet."""
        return [
            number
            for number, member in enumerate(self.members)
            if member.turns <= self.turn and member.failure is None and not member.finished
        ]

    def is_over(self) -> bool:
        """Whether no turn is left: all members that live are exported, or none lives."""
        return self.ended or all(member.finished for member in self.living())

    def living(self) -> list[Member]:
        """The members that have not failed."""
        return [member for member in self.members if member.failure is None]

    def write(self, run: Path) -> None:
        """Write it down in the run directory."""
        write_atomically(run / STATE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def begun(points: list[Point]) -> Population:
    """A population that has not trained yet."""
    return Population([Member(dict(point), dict(point)) for point in points])


def read(run: Path) -> Population | None:
    """The population of a run; None where none is written.

    Raises:
        UserError: what is written is none.
    """
    if not (run / STATE).exists():
        return None
    try:
        found = read_object(run / STATE) or {}
        members = [
            Member(**{**one, "takeovers": [Takeover(**takeover) for takeover in one["takeovers"]]})
            for one in found.pop("members")
        ]
        return Population(members, **found)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{run / STATE}: found no population that can go on, allowed: the file as raylm wrote it; choose another "
            "run.name to search anew"
        ) from None


def schedule(population: Population, number: int) -> list[dict[str, Any]]:
    """The values that a member's weights were trained with, over all members that they come from.

    Returns:
        For each part of the training, in order: ``from_step`` and ``to_step``, the ``trial`` that made it, ``values``.
    """
    found: list[dict[str, Any]] = []
    end = population.members[number].step
    upto = end + 1
    while True:
        member = population.members[number]
        # None takes over from a member that takes over at the same step.
        before = [takeover for takeover in member.takeovers if takeover.step < upto]
        last = before[-1] if before else None
        values = last.values if last else member.first
        start = last.step if last else 0
        if start < end:
            found.insert(0, {"from_step": start, "to_step": end, "trial": number, "values": values})
        if last is None:
            return found
        number, end, upto = last.donor, last.step, last.step
