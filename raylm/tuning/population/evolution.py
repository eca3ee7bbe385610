"""The order of a population: which turn is next, and what happens when all members have made one.

In: what came of turns. Out: turns. Everything is written to ``<run>/population.json`` before it counts, so that a
search that was killed goes on at the turns that were under way, with the same result. Without Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from raylm.config.run_directory import read_object
from raylm.config.stages import TuneConfig
from raylm.training.loop.worker import Turn
from raylm.training.reports.events import append_event
from raylm.tuning.population.explore import chosen, explored, generator_of
from raylm.tuning.population.handover import hand_over
from raylm.tuning.population.rows import values_text
from raylm.tuning.population.state import Population, Takeover
from raylm.tuning.population.turn import Order, Outcome
from raylm.tuning.search import TRIAL, trial_directory
from raylm.tuning.space import is_minimised


class Evolution:
    """A population that goes forward.

    Args:
        run: the run directory.
        population: as it begins, or as it was interrupted.
        check_owner: raises where another start of the search has taken over.
    """

    def __init__(
        self, run: Path, config: TuneConfig, population: Population, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        self.population, self._run, self._tuning, self._seed = population, run, config.tuning, config.run.seed
        self._check_owner = check_owner
        assert config.training is not None and config.training.evaluate_every_steps is not None
        self._evaluation = config.training.evaluate_every_steps
        self._steps = self._tuning.perturbation_evaluations * self._evaluation
        self._seconds, self._since = population.seconds, time.monotonic()
        # What has begun comes to its end, whatever the budget says.
        self._begun = {
            number
            for number in population.due()
            if (read_object(trial_directory(run, number) / TRIAL) or {}).get("status") == "running"
        }
        self._write()

    def next_order(self, running: Collection[int]) -> Order | None:
        """The next turn; None where there is none while the members ``running`` make theirs, or none at all."""
        population = self.population
        if population.is_over():
            return None
        spent = self._is_spent()
        if not population.due() and not running and not spent:
            self._advance()
        due = [number for number in population.due() if number not in running]
        if spent:
            due = [number for number in due if number in self._begun]
            if not due and not running:
                return self._last_order()
        if not due:
            return None
        member = population.members[due[0]]
        last = (population.turn + 1) * self._steps
        return Order(due[0], member.values, Turn(member.step, last))

    def record(self, order: Order, outcome: Outcome) -> None:
        """Write down what came of a turn."""
        population, member = self.population, self.population.members[order.member]
        member.turns, member.step = population.turn + 1, outcome.step
        member.failure, member.finished = outcome.failure, outcome.finished
        if outcome.failure is None:
            population.tokens += outcome.tokens - member.tokens
            member.tokens, member.figures = outcome.tokens, outcome.figures
        population.ended |= order.turn.exports
        population.seconds = self._searched_seconds()
        self._begun.discard(order.member)
        self._write()

    def _advance(self) -> None:
        """After a turn of all: have those behind take over from those ahead, and begin the next one."""
        population, tuning = self.population, self._tuning
        self._check_owner()
        generator, step = generator_of(self._seed, population.turn), (population.turn + 1) * self._steps
        pairs = chosen(
            population, str(tuning.metric), generator, minimised=is_minimised(tuning),
            exploits=step >= tuning.grace_evaluations * self._evaluation,
        )  # fmt: skip
        texts: list[str] = []
        for number, donor in pairs:
            member, other = population.members[number], population.members[donor]
            values = explored(tuning, other.values, generator)
            hand_over(trial_directory(self._run, donor), trial_directory(self._run, number), other.step)
            member.takeovers.append(Takeover(other.step, donor, values, member.failure))
            texts.append(f"goes on from trial {donor} with {values_text(values)}")
            member.values, member.step, member.tokens = values, other.step, other.tokens
            member.figures, member.failure = dict(other.figures), None
        population.turn += 1
        self._write()
        for (number, _), text in zip(pairs, texts, strict=True):
            event = {"kind": "takeover", "step": population.members[number].step, "text": text}
            append_event(trial_directory(self._run, number), event)

    def _write(self) -> None:
        self._check_owner()
        self.population.write(self._run)

    def _is_spent(self) -> bool:
        budget = self._tuning.budget
        if budget.minutes is not None and self._searched_seconds() >= 60 * budget.minutes:
            return True
        return budget.tokens is not None and self.population.tokens >= budget.tokens

    def _searched_seconds(self) -> float:
        return self._seconds + time.monotonic() - self._since

    def _last_order(self) -> Order | None:
        """Where the budget is used up: the best member so far is exported as it is."""
        metric, sign = str(self._tuning.metric), 1 if is_minimised(self._tuning) else -1
        known = [
            # Of those with the same figures, the one that they were measured of.
            (sign * member.figures[metric], bool(member.takeovers and member.takeovers[-1].step == member.step), number)
            for number, member in enumerate(self.population.members)
            if member.failure is None and metric in member.figures
        ]
        if not known:
            self.population.ended = True
            self._write()
            return None
        number = min(known)[2]
        member = self.population.members[number]
        return Order(number, member.values, Turn(member.step, member.step, exports=True))
