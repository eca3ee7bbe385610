"""Which of Ray Tune's schedulers stops trials before their end: ``tuning.scheduler: median``.

It counts in steps, not in reports: a trial that goes on after an interrupt reports from where it stood. The others'
rungs are in :mod:`raylm.tuning.halving`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import MedianStoppingRule, TrialScheduler

from raylm.config.tuning import TuningSection

if TYPE_CHECKING:
    from raylm.config.training import TrainingSection


class MedianOfWhatIsKnown(MedianStoppingRule):
    """Ray Tune's, which cannot take a result without the metric, such as that of a trial that failed."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Leave out what has no metric."""
        if self._metric in result and self._time_attr in result:
            super().on_trial_complete(tune_controller, trial, result)


def make_scheduler(tuning: TuningSection, training: TrainingSection) -> TrialScheduler | None:
    """Ray Tune's scheduler; None where it stops no trial."""
    if tuning.scheduler != "median":
        return None
    grace = tuning.grace_evaluations * (training.evaluate_every_steps or 1)
    return MedianOfWhatIsKnown(time_attr="step", grace_period=grace)
