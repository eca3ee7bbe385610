"""A turn of a member, in a process that makes one turn after the other.

In: which member goes forward, to which step and with which values. Out: what the last evaluation found, or why the
member failed. It trains in the ranks that the process holds, which are forked anew for each turn: an engine that was
made in a process leaves some of its memory taken there, and a member may make many turns.
"""

from __future__ import annotations

import dataclasses
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.config.distributions import Point
from raylm.errors import first_line
from raylm.training.checkpoints.mirror import METRICS
from raylm.training.loop.worker import TrainingJob, Turn
from raylm.training.reports.metrics import read_metrics
from raylm.tuning.ranks import KeptRanks
from raylm.tuning.search import (
    FAILURE,
    FAILURE_LOG,
    FINISHED,
    Planner,
    figures_at,
    finite,
    go_back,
    job_of,
    note,
    reached,
    trained,
    trial_directory,
)

# Of a member between two turns.
WAITING = "waiting"


@dataclass(frozen=True)
class Order:
    """One turn of one member, by number.

    Attributes:
        values: with which it trains.
        turn: from which step to which.
    """

    member: int
    values: Point
    turn: Turn


@dataclass(frozen=True)
class Outcome:
    """What came of a turn.

    Attributes:
        step: to which the member has trained.
        figures: of the last evaluation, by name.
        finished: whether its weights are exported.
    """

    step: int
    tokens: int = 0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    failure: str | None = None
    finished: bool = False


class TurnProcess:
    """An actor: makes turns until it is closed.

    Args:
        base: what all members share.
    """

    def __init__(self, base: TrainingJob, planner: Planner) -> None:
        self._base, self._planner, self._ranks = base, planner, KeptRanks()

    def run(self, order: Order) -> Outcome:
        """Make a turn; whatever fails is its outcome."""
        go_back(self._planner.folder)
        return run_turn(order, self._base, self._planner, self._ranks)

    def close(self) -> None:
        """Give back what the ranks hold."""
        self._ranks.close()


def run_turn(order: Order, base: TrainingJob, planner: Planner, ranks: KeptRanks | None) -> Outcome:
    """Make a turn in ``ranks``, or without any in this process; whatever fails is its outcome."""
    directory, metric = trial_directory(base.directory, order.member), str(planner.config.tuning.metric)
    directory.mkdir(parents=True, exist_ok=True)
    note(directory, order.values, "running")
    status = "failed"
    try:
        job = dataclasses.replace(job_of(order.values, base, planner, directory), turn=order.turn)
        final = trained(job, base, planner.folder, ranks, lambda metrics: _check(metrics, metric))
        outcome = _outcome(final, directory, metric)
        status = "failed" if outcome.failure else "finished" if outcome.finished else WAITING
    except Exception as error:  # noqa: BLE001 - whatever it is, the other members go on
        (directory / FAILURE_LOG).write_text(traceback.format_exc(), encoding="utf-8")
        outcome = Outcome(reached(directory), failure=first_line(error))
    finally:
        note(directory, order.values, status)
    return outcome


def _check(metrics: dict[str, Any], metric: str) -> None:
    finite(metrics, metric)


def _outcome(final: dict[str, Any], directory: Path, metric: str) -> Outcome:
    if FAILURE in final:
        return Outcome(reached(directory), failure=final[FAILURE])
    if FINISHED not in final:
        return Outcome(final["step"], final["tokens"], finite(final, metric))
    figures = figures_at(read_metrics(directory / METRICS), final["exported_step"], metric)
    return Outcome(final["step"], final["tokens"], figures, finished=True)
