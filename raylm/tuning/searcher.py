"""The search as Ray Tune drives it: which point is next, when there is none, and what came of each.

In: results of trials, as Ray Tune hands them on. Out: points from :mod:`raylm.tuning.candidates`. Ray Tune saves the
state beside that of its trials, and gives it back when the search goes on.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from raylm.config.distributions import Point
from raylm.config.tuning import BudgetSection, TuningSection
from raylm.training.loop.worker import Turn
from raylm.tuning.candidates import Candidates, Learnt, Listed
from raylm.tuning.halving import Halving
from raylm.tuning.search import FAILURE, FINISHED, TURN
from raylm.tuning.space import draw_candidates, earlier_trials

# Of a trial, at most: one for each of its rungs.
MOST_TURNS = 64


def make_candidates(
    tuning: TuningSection, seed: int, metrics: Sequence[str], minimised: Sequence[bool], at_a_time: int = 1
) -> Candidates:
    """The points that ``tuning`` asks for.

    Args:
        metrics: keys of the figures that the search is about.
        minimised: of each of them, whether a smaller one is better.

    Raises:
        UserError: ``tuning.start_from`` is no search over the same keys.
    """
    known = earlier_trials(tuning, list(metrics))
    first = list(tuning.start)
    ended = [trial for trial in known if trial.step is None]
    if ended and len(minimised) == 1:
        first.append(min(ended, key=lambda trial: trial.values[0] * (1 if minimised[0] else -1)).point)
    if tuning.searcher in ("tpe", "nsga2"):
        return Learnt(tuning, seed, minimised, first, known, at_a_time)
    return Listed(draw_candidates(tuning, seed, first))


class CandidateSearch(Searcher):
    """Hands out the points of ``candidates``; with ``halving`` a part of a trial at a time, each of which Ray Tune has
    as a trial of its own.

    Args:
        metrics: keys of a result.
        at_a_time: most trials that run together.
        minimised: with halving, whether a smaller metric is better.
    """

    def __init__(
        self,
        candidates: Candidates,
        metrics: Sequence[str],
        budget: BudgetSection,
        at_a_time: int,
        halving: Halving | None = None,
        *,
        minimised: bool = True,
    ) -> None:
        super().__init__(metric=list(metrics), mode=["min"] * len(metrics))
        self.candidates, self.halving = candidates, halving
        self._budget, self._at_a_time, self._sign = budget, at_a_time, 1 if minimised else -1
        # Of each trial its point; Ray Tune's name of one -> its number and the turn that it makes; which of them run;
        # what each trial has trained on.
        self._points: list[Point] = []
        self._made: dict[str, tuple[int, Turn | None]] = {}
        self._running: set[str] = set()
        self._tokens: dict[int, int] = {}
        self._seconds, self._began = 0.0, time.monotonic()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """All of them are known already."""
        return True

    @property
    def most(self) -> int:
        """Trials as Ray Tune counts them, at most."""
        return self.candidates.count * (1 if self.halving is None else MOST_TURNS)

    def suggest(self, trial_id: str) -> Point | str | None:
        """The next point; None where as many run as may, ``FINISHED`` where there is no further one."""
        if (has_room := len(self._running) < self._at_a_time) and (found := self._next()) is not None:
            number, turn = found
            self._made[trial_id] = found
            self._running.add(trial_id)
            return self._points[number] | ({} if turn is None else {TURN: [number, turn.first, turn.last]})
        # What runs may be among the best, and go on.
        waits = (self.halving is not None and self._running) or (not has_room and not self._is_begun())
        return None if waits else Searcher.FINISHED

    def _next(self) -> tuple[int, Turn | None] | None:
        """The next trial, and the part of it that is to be made."""
        halving = self.halving
        if halving is not None and not self._is_spent() and (found := halving.next_turn()) is not None:
            return found
        if not self._is_begun():
            number = len(self._points)
            self._points.append(self.candidates.ask())
            return number, None if halving is None else halving.begin(number)
        return None if halving is None or self._running else halving.last_turn()

    def _is_begun(self) -> bool:
        """Whether no trial is left to begin."""
        return len(self._points) >= self.candidates.count or self._is_spent()

    def _is_spent(self) -> bool:
        budget = self._budget
        if budget.minutes is not None and self._searched_seconds() >= 60 * budget.minutes:
            return True
        return budget.tokens is not None and sum(self._tokens.values()) >= budget.tokens

    def _searched_seconds(self) -> float:
        return self._seconds + time.monotonic() - self._began

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note what a trial has trained on so far."""
        number = self._made[trial_id][0]
        self._tokens[number] = result.get("tokens", self._tokens.get(number, 0))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn what came of a trial."""
        self._running.discard(trial_id)
        found = result or {}
        self.on_trial_result(trial_id, found)
        values = [found.get(name) for name in self.metric]
        failed, finished = (
            error or FAILURE in found or any(value is None for value in values),
            bool(found.get(FINISHED)),
        )
        number, turn = self._made[trial_id]
        if self.halving is not None and turn is not None:
            score = None if failed else (self._sign * values[0], found["validation_loss"])
            self.halving.record(number, turn, score, finished=finished)
        self.candidates.tell(number, None if failed else values, None if finished else found.get("step"))

    def save(self, checkpoint_path: str) -> None:
        """Write the state."""
        state = {
            "candidates": self.candidates,
            "halving": self.halving,
            "points": self._points,
            "made": self._made,
            "running": self._running,
            "tokens": self._tokens,
            "seconds": self._searched_seconds(),
        }
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        """Go on with what was written."""
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        self.candidates, self.halving = state["candidates"], state["halving"]
        self._points, self._made = state["points"], state["made"]
        self._running, self._tokens = state["running"], state["tokens"]
        self._seconds, self._began = state["seconds"], time.monotonic()
