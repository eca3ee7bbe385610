"""Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934, algorithm 2) and Hyperband's brackets of it (Li et
al. 2018, arXiv:1603.06560): ``tuning.scheduler: asha`` and ``hyperband``.

In: what trials had at rungs. Out: which of them goes on, and to which step. A trial pauses at each rung, by a
checkpoint, and goes on once it is among the best of those that came as far; with Ray Tune's own scheduler, which can
only stop trials, those that come first go on whatever they are worth, where few run together. Knows nothing of Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raylm.config.tuning import TuningSection
from raylm.training.loop.worker import Turn

if TYPE_CHECKING:
    from raylm.config.training import TrainingSection

# Hyperband's, where the length of training is not given in steps, and at most.
USUAL_BRACKETS, MOST_BRACKETS = 3, 5
WORST = (math.inf, math.inf)


@dataclass
class Rung:
    """A step at which trials are compared.

    Attributes:
        scores: of the trials that came to it, smaller ones better.
        passed: those that went on.
    """

    step: int
    scores: dict[int, tuple[float, float]] = field(default_factory=dict)
    passed: set[int] = field(default_factory=set)

    def waiting(self) -> list[int]:
        """The trials that have not gone on, the best first; without those that failed."""
        found = [trial for trial, score in self.scores.items() if trial not in self.passed and score != WORST]
        return sorted(found, key=lambda trial: (self.scores[trial], trial))

    def promotable(self, factor: int) -> list[int]:
        """Those of them that are among the best one in ``factor`` of all that came to it."""
        best = sorted(self.scores, key=lambda trial: (self.scores[trial], trial))[: len(self.scores) // factor]
        return [trial for trial in self.waiting() if trial in best]


class Halving:
    """The rungs of a search.

    Args:
        grace: steps to the first rung.
        factor: by which the steps grow from rung to rung, and of how many trials one goes on.
        brackets: of Hyperband; trials of bracket s first pause ``factor`` to the power of s times as late.
        draw: gives the bracket of a trial, by its number.
    """

    def __init__(self, grace: int, factor: int, brackets: int = 1, draw: Callable[[int], int] | None = None) -> None:
        self._grace, self._factor, self._draw = grace, factor, draw
        # Of each bracket the rungs that a trial has come to, the lowest first.
        self._brackets: list[list[Rung]] = [[] for _ in range(brackets)]
        self._of: dict[int, int] = {}
        self._finished = 0

    def begin(self, trial: int) -> Turn:
        """The first turn of a new trial."""
        self._of[trial] = self._draw(trial) if self._draw is not None else 0
        return Turn(0, self._step(self._of[trial], 0))

    def record(self, trial: int, turn: Turn, score: tuple[float, float] | None, *, finished: bool) -> None:
        """What a trial had at the end of a turn.

        Args:
            score: the metric, smaller where it is better, and the loss, by which trials with one metric are told
                apart; None of a trial that failed.
        """
        bracket = self._of[trial]
        rungs, place = self._brackets[bracket], 0
        while self._step(bracket, place) < turn.last:
            place += 1
        while len(rungs) <= place:
            rungs.append(Rung(self._step(bracket, len(rungs))))
        rungs[place].scores[trial] = WORST if score is None else score
        if finished:
            rungs[place].passed.add(trial)
            self._finished += 1

    def next_turn(self) -> tuple[int, Turn] | None:
        """A trial that is to go on, those nearest to the end first, and its turn; None where there is none."""
        for depth in range(max(map(len, self._brackets)) - 1, -1, -1):
            for bracket, rungs in enumerate(self._brackets):
                if depth < len(rungs) and (found := rungs[depth].promotable(self._factor)):
                    return self._promoted(bracket, depth, found[0])
        return None

    def last_turn(self) -> tuple[int, Turn] | None:
        """Once no trial is left to begin: the one that has come farthest and its turn, until one is at its end."""
        if self._finished:
            return None
        places = [(bracket, depth) for bracket, rungs in enumerate(self._brackets) for depth in range(len(rungs))]
        waiting = [
            (-self._brackets[bracket][depth].step, self._brackets[bracket][depth].scores[trial], bracket, depth, trial)
            for bracket, depth in places
            for trial in self._brackets[bracket][depth].waiting()[:1]
        ]
        return self._promoted(*min(waiting)[2:]) if waiting else None

    def _promoted(self, bracket: int, depth: int, trial: int) -> tuple[int, Turn]:
        rung = self._brackets[bracket][depth]
        rung.passed.add(trial)
        return trial, Turn(rung.step, self._step(bracket, depth + 1))

    def _step(self, bracket: int, place: int) -> int:
        return self._grace * self._factor ** (bracket + place)


@dataclass(frozen=True)
class DrawnBrackets:
    """The bracket of a trial, drawn from the seed and its number; one with more rungs is drawn more often, as in Ray
    Tune's scheduler."""

    count: int
    seed: int

    def __call__(self, trial: int) -> int:
        """Of the trial with that number."""
        import numpy as np

        weights = np.exp(-np.arange(self.count))
        return int(np.random.default_rng([self.seed, trial]).choice(self.count, p=weights / weights.sum()))


def make_halving(tuning: TuningSection, training: TrainingSection, seed: int) -> Halving | None:
    """The rungs that ``tuning.scheduler`` asks for; None where it asks for none, or trials are not evaluated."""
    if tuning.scheduler not in ("asha", "hyperband") or training.evaluate_every_steps is None:
        return None
    grace, count = tuning.grace_evaluations * training.evaluate_every_steps, 1
    if tuning.scheduler == "hyperband":
        count = brackets(tuning, training)
    return Halving(grace, tuning.reduction_factor, count, DrawnBrackets(count, seed))


def brackets(tuning: TuningSection, training: TrainingSection) -> int:
    """Hyperband's: as many as there are rungs from ``grace_evaluations`` to the end of training."""
    if training.steps is None:
        return USUAL_BRACKETS
    grace = tuning.grace_evaluations * (training.evaluate_every_steps or 1)
    rungs = math.log(max(1.0, training.steps / grace)) / math.log(tuning.reduction_factor)
    return max(1, min(MOST_BRACKETS, int(rungs + 1e-9) + 1))
