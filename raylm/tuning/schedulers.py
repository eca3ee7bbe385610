"""Which trials are stopped before their end: ``tuning.scheduler``, as Ray Tune's schedulers.

All of them count in steps, not in reports: a trial that goes on after an interrupt reports from where it stood. None
pauses a trial or changes one that runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from raylm.config.tuning import TuningSection

if TYPE_CHECKING:
    from raylm.config.training import TrainingSection

# Larger than any number of steps, so that no trial is cut off at the end.
ENDLESS = 10**9
# Hyperband's, where the length of training is not given in steps, and at most.
USUAL_BRACKETS, MOST_BRACKETS = 3, 5


class MedianOfWhatIsKnown(MedianStoppingRule):
    """Ray Tune's, which cannot take a result without the metric, such as that of a trial that failed."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Leave out what has no metric."""
        if self._metric in result and self._time_attr in result:
            super().on_trial_complete(tune_controller, trial, result)


def make_scheduler(tuning: TuningSection, training: TrainingSection) -> TrialScheduler | None:
    """Ray Tune's scheduler; None where trials are not stopped."""
    if tuning.scheduler == "none":
        return None
    grace = tuning.grace_evaluations * (training.evaluate_every_steps or 1)
    if tuning.scheduler == "median":
        return MedianOfWhatIsKnown(time_attr="step", grace_period=grace)
    return ASHAScheduler(
        time_attr="step",
        max_t=ENDLESS,
        grace_period=grace,
        reduction_factor=tuning.reduction_factor,
        brackets=brackets(tuning, training) if tuning.scheduler == "hyperband" else 1,
    )


def brackets(tuning: TuningSection, training: TrainingSection) -> int:
    """Hyperband's: as many as there are rungs from ``grace_evaluations`` to the end of training.

    Bracket number s leaves its trials alone for ``reduction_factor`` to the power of s times as long as the first.
    """
    if training.steps is None:
        return USUAL_BRACKETS
    grace = tuning.grace_evaluations * (training.evaluate_every_steps or 1)
    rungs = math.log(max(1.0, training.steps / grace)) / math.log(tuning.reduction_factor)
    return max(1, min(MOST_BRACKETS, int(rungs + 1e-9) + 1))
