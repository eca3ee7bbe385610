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
from raylm.tuning.candidates import Candidates, Learnt, Listed
from raylm.tuning.search import FAILURE, FINISHED
from raylm.tuning.space import draw_candidates, earlier_trials


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
    """Hands out the points of ``candidates``.

    Args:
        metrics: keys of a result.
        at_a_time: most trials that run together.
    """

    def __init__(self, candidates: Candidates, metrics: Sequence[str], budget: BudgetSection, at_a_time: int) -> None:
        super().__init__(metric=list(metrics), mode=["min"] * len(metrics))
        self.candidates = candidates
        self._budget, self._at_a_time = budget, at_a_time
        # Ray Tune's name of a trial -> its number; which of them run; what each has trained on.
        self._numbers: dict[str, int] = {}
        self._running: set[str] = set()
        self._tokens: dict[str, int] = {}
        self._seconds, self._began = 0.0, time.monotonic()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """All of them are known already."""
        return True

    def suggest(self, trial_id: str) -> Point | str | None:
        """The next point; None where as many run as may, ``FINISHED`` where there is no further one."""
        if len(self._numbers) >= self.candidates.count or self._is_spent():
            return Searcher.FINISHED
        if len(self._running) >= self._at_a_time:
            return None
        self._numbers[trial_id] = len(self._numbers)
        self._running.add(trial_id)
        return self.candidates.ask()

    def _is_spent(self) -> bool:
        budget = self._budget
        if budget.minutes is not None and self._searched_seconds() >= 60 * budget.minutes:
            return True
        return budget.tokens is not None and sum(self._tokens.values()) >= budget.tokens

    def _searched_seconds(self) -> float:
        return self._seconds + time.monotonic() - self._began

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note what a trial has trained on so far."""
        self._tokens[trial_id] = result.get("tokens", self._tokens.get(trial_id, 0))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn what came of a trial."""
        self._running.discard(trial_id)
        found = result or {}
        self.on_trial_result(trial_id, found)
        values = [found.get(name) for name in self.metric]
        failed = error or FAILURE in found or any(value is None for value in values)
        self.candidates.tell(
            self._numbers[trial_id], None if failed else values, None if found.get(FINISHED) else found.get("step")
        )

    def save(self, checkpoint_path: str) -> None:
        """Write the state."""
        state = {
            "candidates": self.candidates,
            "numbers": self._numbers,
            "running": self._running,
            "tokens": self._tokens,
            "seconds": self._searched_seconds(),
        }
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        """Go on with what was written."""
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        self.candidates, self._numbers = state["candidates"], state["numbers"]
        self._running, self._tokens = state["running"], state["tokens"]
        self._seconds, self._began = state["seconds"], time.monotonic()
