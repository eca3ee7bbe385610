"""A population on Ray: as many processes as fit, each of which makes one turn after the other.

Ray Tune's own scheduler of this name is not used: it pauses and copies trials by checkpoints that they hand to Ray
Tune, draws from generators without a seed, and gives up the workers of a trial where it pauses it.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

from raylm.errors import RunFailure, first_line
from raylm.interrupts import Deferred, deferred
from raylm.training.checkpoints.mirror import Mirror
from raylm.training.checkpoints.storage import Storage
from raylm.tuning.population import state
from raylm.tuning.population.evolution import Evolution
from raylm.tuning.population.rows import LINEAGE, lineage, population_rows
from raylm.tuning.population.turn import Order, Outcome, TurnProcess
from raylm.tuning.progress import Look, SearchProgress, trained_so_far
from raylm.tuning.results import rows_so_far
from raylm.tuning.search import HEAD_NODE_SHARE, UNWIND_SECONDS, Planner
from raylm.tuning.searcher import make_candidates
from raylm.tuning.space import is_minimised

if TYPE_CHECKING:
    from raylm.training.loop.worker import TrainingJob

LOOK_SECONDS = 0.5


def evolve(planner: Planner, base: TrainingJob, at_a_time: int) -> list[dict[str, Any]]:
    """Train the population to its end, from where it was interrupted; its rows.

    Raises:
        UserError: what is written of an interrupted one is damaged.
        RunFailure: a checkpoint could not be handed over, or a later start has taken over.
    """
    tuning, run = planner.config.tuning, base.directory
    if (population := state.read(run)) is None:
        metric = str(tuning.metric)
        candidates = make_candidates(tuning, planner.config.run.seed, [metric], [is_minimised(tuning)])
        population = state.begun([candidates.ask() for _ in range(candidates.count)])
        # Of a population whose members all failed, and which begins anew.
        shutil.rmtree(run / "trials", ignore_errors=True)
    mirror, count = Mirror(Storage(base.storage), run), len(population.members)
    evolution = Evolution(run, planner.config, population, lambda: mirror.check_owner(base.attempt))

    def look() -> Look:
        rows = rows_so_far(run / "trials", tuning)
        taken = [{**row, LINEAGE: lineage(population.members[row["trial"]])} for row in rows]
        found = trained_so_far(taken, count, tuning)
        return Look(found.done, f"turn {population.turn + 1}, {found.note}", found.lines)

    with deferred() as signals, SearchProgress(count, "steps", look):
        processes = _Processes(planner, base, min(at_a_time, count))
        try:
            _follow(evolution, processes, signals)
        except OSError as error:
            raise RunFailure(f"a checkpoint could not be handed over: {error}") from error
        finally:
            processes.close(at_once=signals.received is not None)
    return population_rows(population, tuning)


def _follow(evolution: Evolution, processes: _Processes, signals: Deferred) -> None:
    """Make all turns, until the end or a signal."""
    while signals.received is None:
        while processes.has_room:
            if (order := evolution.next_order(processes.running)) is None:
                break
            processes.begin(order)
        if not processes.running:
            return
        for order, outcome in processes.ended(LOOK_SECONDS):
            evolution.record(order, outcome)


class _Processes:
    """Actors that make turns; they are kept until the search ends.

    Args:
        most: how many there are at a time.
    """

    def __init__(self, planner: Planner, base: TrainingJob, most: int) -> None:
        import ray

        self._most, self._failures = most, base.config.resources.max_failures
        # Large, and the same for all of them.
        self._base, self._planner = ray.put(base), ray.put(planner)
        # What a turn needs, its ranks have reserved.
        self._made = ray.remote(TurnProcess).options(num_cpus=0, resources=HEAD_NODE_SHARE)
        self._idle: list[Any] = []
        # Reference to a turn's outcome -> its actor, the turn, and how often a process may still die over it.
        self._turns: dict[Any, tuple[Any, Order, int]] = {}

    @property
    def running(self) -> set[int]:
        """The members that make a turn."""
        return {order.member for _, order, _ in self._turns.values()}

    @property
    def has_room(self) -> bool:
        """Whether another turn can begin."""
        return len(self._turns) < self._most

    def begin(self, order: Order, left: int | None = None) -> None:
        """Begin a turn."""
        actor = self._idle.pop() if self._idle else self._made.remote(self._base, self._planner)
        self._turns[actor.run.remote(order)] = (actor, order, self._failures if left is None else left)

    def ended(self, seconds: float) -> list[tuple[Order, Outcome]]:
        """The turns that end within some seconds, with what came of them; those whose process died begin again."""
        import ray

        ready, _ = ray.wait(list(self._turns), num_returns=1, timeout=seconds)
        found = []
        for reference in ready:
            actor, order, left = self._turns.pop(reference)
            try:
                found.append((order, ray.get(reference)))
                self._idle.append(actor)
            except ray.exceptions.RayError as error:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor)
                if left:
                    self.begin(order, left - 1)
                else:
                    found.append((order, Outcome(order.turn.first, failure=f"its process died: {first_line(error)}")))
        return found

    def close(self, *, at_once: bool) -> None:
        """End all processes.

        Args:
            at_once: without waiting for what their ranks hold, which goes back with the search.
        """
        import ray

        actors = [*self._idle, *(actor for actor, _, _ in self._turns.values())]
        with contextlib.suppress(ray.exceptions.RayError):
            if not at_once and not self._turns:
                ray.get([actor.close.remote() for actor in actors], timeout=UNWIND_SECONDS)
        for actor in actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
