"""What a run looks at in its evaluations: which was the best, how long none was better, and when a plateau is reached.

All of it is in the loop's state, which checkpoints hold, so that a resumed run judges as the uninterrupted one does.
"""

from __future__ import annotations

from typing import Any

from raylm.config.training import EarlyStoppingSection, TrainingSection
from raylm.errors import RunFailure, UserError
from raylm.tasks.measures import LOSSES, VALIDATION, improves, measured
from raylm.tasks.objective import Objective


def check_metrics(training: TrainingSection, objective: Objective) -> None:
    """Refuse a metric that the task does not give.

    Raises:
        UserError: one line.
    """
    allowed = (*LOSSES, *(f"{VALIDATION}{name}" for name in objective.measures))
    asked = {}
    if training.early_stopping is not None:
        asked["training.early_stopping.metric"] = training.early_stopping.metric
    if training.schedule == "plateau":
        asked["training.plateau.metric"] = training.plateau.metric
    for key, metric in asked.items():
        if metric not in allowed:
            raise UserError(
                f"{key}: found '{metric}', allowed with objective.type {objective.name}: {', '.join(allowed)}"
            )


def initial_state() -> dict[str, Any]:
    """The loop's state before the first step. ``best`` is the value of ``metric``; -``step`` and -``validation_loss``
    are those of the same evaluation."""
    return {
        "step": 0,
        "tokens": 0,
        "metric": LOSSES[0],
        "best": None,
        "best_step": None,
        "best_validation_loss": None,
        "without_improvement": 0,
        "skipped": [],
        "anomalies": 0,
        "plateau": {"best": None, "without_improvement": 0, "factor": 1.0},
    }


def judge(state: dict[str, Any], training: TrainingSection, metrics: dict[str, Any]) -> None:
    """Note an evaluation in ``state``.

    Args:
        metrics: the line of metrics.jsonl, with what was evaluated.
    """
    stopping = training.early_stopping or EarlyStoppingSection()
    if state["metric"] != stopping.metric:
        # It may change between two starts of a run, and values of two metrics do not compare.
        state |= {"metric": stopping.metric, "best": None, "without_improvement": 0}
    value, loss = _found(metrics, stopping.metric), metrics["validation_loss"]
    state |= {"validation_loss": loss, "measures": {metric: metrics[metric] for metric in measured(metrics)}}
    if improves(stopping.metric, value, state["best"], stopping.minimum_change):
        state |= {"best": value, "without_improvement": 0, "best_step": metrics["step"], "best_validation_loss": loss}
    else:
        state["without_improvement"] += 1
    if training.schedule == "plateau":
        state["plateau"] = after_evaluation(state["plateau"], training, _found(metrics, training.plateau.metric))


def _found(metrics: dict[str, Any], metric: str) -> float:
    # Tags without a scheme have no spans, for one.
    if metric not in metrics:
        allowed = ", ".join((*LOSSES, *measured(metrics)))
        raise RunFailure(f"the metric {metric} cannot be measured on this data, allowed: {allowed}")
    return metrics[metric]


def after_evaluation(plateau: dict[str, Any], training: TrainingSection, value: float) -> dict[str, Any]:
    """The plateau's state after an evaluation that found ``value``: its factor falls where ``patience`` evaluations in
    a row brought no improvement, and counting begins again."""
    section = training.plateau
    if improves(section.metric, value, plateau["best"], section.minimum_change):
        return {**plateau, "best": value, "without_improvement": 0}
    count, factor = plateau["without_improvement"] + 1, plateau["factor"]
    if count >= section.patience:
        count, factor = 0, max(training.final_learning_rate_fraction, factor * section.factor)
    return {**plateau, "without_improvement": count, "factor": factor}


def is_patience_over(state: dict[str, Any], training: TrainingSection) -> bool:
    """Whether early stopping ends the run."""
    stopping = training.early_stopping
    return stopping is not None and stopping.patience is not None and state["without_improvement"] >= stopping.patience
