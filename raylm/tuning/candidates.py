"""Which point is tried next: from a list that was drawn before, or by an Optuna sampler that learns from the trials.

In: the space, and what came of each trial. Out: points. Knows nothing of Ray, and travels by pickle, so that a search
that was interrupted goes on with what was learnt.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from raylm.config.distributions import Distribution, Point, in_order, is_active
from raylm.config.tuning import TuningSection
from raylm.tuning.space import Known, most_trials

if TYPE_CHECKING:
    import optuna

# Trials that are drawn at random before tpe learns from them, of fewer than twice as many a half; and the share of all
# that is the first generation of nsga2.
FIRST_TRIALS = 10
FIRST_GENERATION = 1 / 3
LEAST_FIRST = 3


class Candidates(Protocol):
    """The points of a search, one after the other.

    Attributes:
        count: how many there are.
    """

    count: int

    def ask(self) -> Point:
        """The next one; they are numbered from 0."""

    def tell(self, number: int, values: Sequence[float] | None, step: int | None = None) -> None:
        """What came of a point; one that was stopped and goes on is told of again.

        Args:
            values: of the metrics; None where the trial failed.
            step: at which it was stopped early.
        """


class Listed:
    """Points that are known before: searchers random and grid."""

    def __init__(self, points: list[Point]) -> None:
        self._points, self._asked, self.count = points, 0, len(points)

    def ask(self) -> Point:
        """The next one."""
        self._asked += 1
        return dict(self._points[self._asked - 1])

    def tell(self, number: int, values: Sequence[float] | None, step: int | None = None) -> None:
        """Nothing is learnt."""


class Learnt:
    """Points that an Optuna sampler chooses: searchers tpe and nsga2.

    Args:
        minimised: of each metric, whether a smaller one is better.
        first: points that are tried first.
        known: trials of an earlier search to learn from.
        at_a_time: trials that run together.
    """

    def __init__(
        self,
        tuning: TuningSection,
        seed: int,
        minimised: Sequence[bool],
        first: Sequence[Point] = (),
        known: Sequence[Known] = (),
        at_a_time: int = 1,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._order = tuning.space, in_order(tuning.space)
        self._minimised, self.count = tuple(minimised), most_trials(tuning, len(first))
        self._asked: list[optuna.Trial] = []
        with warnings.catch_warnings():
            # Of Optuna's, that it may change what is written here.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = _sampler(tuning, seed, at_a_time, self.count, len(known))
        self._study = optuna.create_study(
            sampler=sampler, directions=["minimize" if one else "maximize" for one in self._minimised]
        )
        for trial in known:
            self._study.add_trial(self._known(trial))
        for point in first:
            self._study.enqueue_trial({key: self._inside(key, value) for key, value in point.items()})

    def ask(self) -> Point:
        """The next point."""
        trial = self._study.ask()
        self._asked.append(trial)
        point: Point = {}
        for key in self._order:
            if is_active(self._space[key], point):
                point[key] = _suggested(trial, key, self._space[key])
        return point

    def tell(self, number: int, values: Sequence[float] | None, step: int | None = None) -> None:
        """Learn from a trial; one that failed counts as the worst."""
        import optuna

        trial = self._asked[number]
        told = self._study.trials[trial.number]
        if told.state.is_finished():
            # What is told stays as it is; that the point came farther is learnt as if of another trial.
            if values is not None and len(self._minimised) == 1:
                self._study.add_trial(_came_to(told, values, step))
            return
        if values is None and len(self._minimised) > 1:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif values is None:
            self._study.tell(trial, float("inf") if self._minimised[0] else float("-inf"))
        elif step is not None and len(values) == 1:
            # Compared with what others had at this step.
            trial.report(values[0], step)
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, list(values))

    def _inside(self, key: str, value: Any) -> Any:
        """A value as Optuna is told it: of a list its place, as only some types can stand there themselves."""
        values = self._space[key].choice
        if values is None:
            return value
        return next(place for place, one in enumerate(values) if Distribution(choice=[one]).has(value))

    def _known(self, trial: Known) -> optuna.trial.FrozenTrial:
        import optuna

        return optuna.trial.create_trial(
            **_result(trial.values, trial.step),
            params={key: self._inside(key, value) for key, value in trial.point.items()},
            distributions={key: _distribution(self._space[key]) for key in trial.point},
        )


def _came_to(trial: optuna.trial.FrozenTrial, values: Sequence[float], step: int | None) -> optuna.trial.FrozenTrial:
    """The trial with another result."""
    import optuna

    return optuna.trial.create_trial(
        **_result(values, step), params=dict(trial.params), distributions=dict(trial.distributions)
    )


def _result(values: Sequence[float], step: int | None) -> dict[str, Any]:
    """What a trial came to, as Optuna is told it."""
    import optuna

    if step is not None and len(values) == 1:
        return {"state": optuna.trial.TrialState.PRUNED, "intermediate_values": {step: values[0]}}
    return {"state": optuna.trial.TrialState.COMPLETE, "values": list(values)}


def _sampler(tuning: TuningSection, seed: int, at_a_time: int, count: int, known: int) -> optuna.samplers.BaseSampler:
    import optuna

    if tuning.searcher == "nsga2":
        first = max(LEAST_FIRST, int(count * FIRST_GENERATION))
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=first)
    first = max(LEAST_FIRST, min(FIRST_TRIALS, count // 2))
    conditional = any(distribution.when for distribution in tuning.space.values())
    return optuna.samplers.TPESampler(
        seed=seed,
        multivariate=True,
        # Keys that stand together only sometimes are modelled apart.
        group=conditional,
        # What runs at the same time keeps others from its neighbourhood.
        constant_liar=at_a_time > 1,
        n_startup_trials=0 if known >= first else first - known,
    )


def _distribution(distribution: Distribution) -> Any:
    """As Optuna has it; a range in the logarithm with a step is rounded afterwards, which Optuna does not do."""
    import optuna

    if distribution.choice is not None:
        return optuna.distributions.CategoricalDistribution(list(range(len(distribution.choice))))
    if distribution.integer is not None:
        values = distribution.listed
        assert isinstance(values, range)
        return optuna.distributions.IntDistribution(values[0], values[-1], step=values.step)
    if distribution.log_uniform is not None:
        return optuna.distributions.FloatDistribution(*distribution.log_uniform, log=True)
    assert distribution.uniform is not None
    low, high = distribution.uniform
    if distribution.step is not None:
        assert distribution.listed is not None
        high = distribution.listed[-1]
    return optuna.distributions.FloatDistribution(low, high, step=distribution.step)


def _suggested(trial: optuna.Trial, key: str, distribution: Distribution) -> Any:
    found = _distribution(distribution)
    if distribution.choice is not None:
        return distribution.choice[trial.suggest_categorical(key, found.choices)]
    if distribution.integer is not None:
        return trial.suggest_int(key, found.low, found.high, step=found.step)
    return distribution.snapped(trial.suggest_float(key, found.low, found.high, step=found.step, log=found.log))
