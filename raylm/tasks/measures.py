"""What training measures beside losses: the direction and the name of each metric, in one place.

A task's objective gives its measures under the names here (:attr:`raylm.tasks.objective.Objective.measures`); in
metrics.jsonl they are ``validation_NAME``. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["smaller", "larger"]
VALIDATION = "validation_"
# The losses, which every task has.
LOSSES = ("validation_loss", "loss")


@dataclass(frozen=True)
class TrainedMeasure:
    """A measure of a task while it trains.

    Attributes:
        name: for people.
        better: which direction is an improvement.
        share: whether it is shown in percent.
    """

    name: str
    better: Direction = "larger"
    share: bool = True


MEASURES = {
    "accuracy": TrainedMeasure("accuracy"),
    "macro_f1": TrainedMeasure("macro-F1"),
    "span_exact": TrainedMeasure("exact match"),
    "span_f1": TrainedMeasure("span F1"),
    "token_accuracy": TrainedMeasure("token accuracy"),
    "preferred": TrainedMeasure("preferred answers"),
    "margin": TrainedMeasure("margin", share=False),
}


def measure_of(metric: str) -> TrainedMeasure | None:
    """The measure that is the metric ``validation_NAME``; None of a loss, and of what is no metric."""
    return MEASURES.get(metric.removeprefix(VALIDATION)) if metric.startswith(VALIDATION) else None


def improves(metric: str, value: float, best: float | None, minimum_change: float = 0.0) -> bool:
    """Whether ``value`` of a metric is better than the ``best`` by more than ``minimum_change``; NaN never is."""
    if value != value:
        return False
    if best is None:
        return True
    measure = measure_of(metric)
    gain = value - best if measure is not None and measure.better == "larger" else best - value
    return gain > minimum_change


def shown(metric: str, value: float) -> str:
    """A metric's value with as many digits as people want."""
    measure = measure_of(metric)
    return f"{value:.1%}" if measure is not None and measure.share else f"{value:.4f}"


def measured(line: dict[str, Any]) -> dict[str, TrainedMeasure]:
    """The measures that a line of metrics.jsonl has, by metric."""
    found = {metric: measure_of(metric) for metric, value in line.items() if isinstance(value, int | float)}
    return {metric: measure for metric, measure in found.items() if measure is not None}
