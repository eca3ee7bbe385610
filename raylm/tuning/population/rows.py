"""A population as the rows of a report: a member each, with what it took over, and what made the best one's weights."""

from __future__ import annotations

from typing import Any

from raylm.config.distributions import Point
from raylm.config.tuning import TuningSection
from raylm.tuning.population.state import Member, Population, schedule

# Of a row: the members that it went on from; of the best one: the values that its weights were trained with.
LINEAGE, SCHEDULE = "lineage", "schedule"


def population_rows(population: Population, tuning: TuningSection) -> list[dict[str, Any]]:
    """A row a member, in the form of :func:`raylm.tuning.results.make_rows`."""
    return [_row(number, member, tuning) for number, member in enumerate(population.members)]


def _row(number: int, member: Member, tuning: TuningSection) -> dict[str, Any]:
    status = "failed" if member.failure else "finished" if member.finished else "stopped"
    figures = dict.fromkeys(("validation_loss", str(tuning.metric)))
    return {
        "trial": number,
        **{key: member.values.get(key) for key in tuning.space},
        "step": member.step,
        **{name: None if member.failure else member.figures.get(name) for name in figures},
        "status": status,
        **({"failure": member.failure} if member.failure else {}),
        LINEAGE: lineage(member),
    }


def lineage(member: Member) -> list[dict[str, Any]]:
    """What a member took over: at which ``step``, whose (``trial``) checkpoint, with which ``values`` it went on, and
    the ``failure`` that it had come to."""
    return [
        {
            "step": takeover.step,
            "trial": takeover.donor,
            "values": takeover.values,
            **({"failure": takeover.failure} if takeover.failure else {}),
        }
        for takeover in member.takeovers
    ]


def lineage_text(row: dict[str, Any]) -> str:
    """What a row's member took over, in a cell."""
    return ", ".join(f"trial {one['trial']} at {one['step']}" for one in row.get(LINEAGE, ()))


def values_text(values: Point) -> str:
    """Values in a line."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def with_schedule(best: dict[str, Any], population: Population) -> dict[str, Any]:
    """The best row, with the values that its weights were trained with."""
    return {**best, SCHEDULE: schedule(population, best["trial"])}
