"""The metrics of training as people read them: name, unit, which direction is better, and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from raylm.tasks.measures import MEASURES, VALIDATION, TrainedMeasure


@dataclass(frozen=True)
class Figure:
    """One metric of metrics.jsonl.

    Attributes:
        key: in metrics.jsonl.
        symbol: the unit beside a number.
        scale: from metrics.jsonl to the unit.
        better: "lower", "higher" or "".
        smooth: whether noise between points is smoothed away; of a few evaluations nothing is.
    """

    key: str
    title: str
    unit: str
    symbol: str = ""
    scale: float = 1.0
    better: str = ""
    smooth: bool = True


def _of_measure(key: str, measure: TrainedMeasure) -> Figure:
    better = {"larger": "higher", "smaller": "lower"}[measure.better]
    unit, scale = ("%", 100.0) if measure.share else ("", 1.0)
    return Figure(key, f"validation {measure.name}", unit, unit, scale, better, smooth=False)


FIGURES = (
    Figure("loss", "training loss", "nats a target", "nats", better="lower"),
    Figure("validation_loss", "validation loss", "nats a target", "nats", better="lower", smooth=False),
    *(_of_measure(f"{VALIDATION}{name}", measure) for name, measure in MEASURES.items()),
    Figure("learning_rate", "learning rate", "", smooth=False),
    Figure("gradient_norm", "gradient norm", "before clipping"),
    Figure("tokens_per_second", "speed", "tokens/s", "tokens/s", better="higher"),
    Figure("mfu", "MFU", "% of the hardware's matrix-product peak", "%", 100.0, "higher"),
    Figure("data_wait_seconds", "waiting for data", "seconds a point", "s", better="lower", smooth=False),
    Figure("checkpoint_seconds", "waiting for checkpoints", "seconds a point", "s", better="lower", smooth=False),
)
# Drawn only where there was a wait to speak of.
WAITS = ("data_wait_seconds", "checkpoint_seconds")


def points(metrics: list[dict[str, Any]], figure: Figure) -> list[tuple[float, float]]:
    """(step, value in the figure's unit) of each line that has the metric as a finite number."""
    found = []
    for line in metrics:
        value = line.get(figure.key)
        if isinstance(value, int | float) and math.isfinite(value):
            found.append((line["step"], value * figure.scale))
    return found


def is_worth_drawing(figure: Figure, series: list[list[tuple[float, float]]]) -> bool:
    """Whether there is a curve at all, and of a wait, whether there is one to speak of."""
    values = [y for one in series for _, y in one]
    if not values or max(map(len, series)) < 2:
        return False
    if figure.key in WAITS:
        return max(values) > 0.1
    return figure.key != "mfu" or max(values) > 0


def short(value: float) -> str:
    """A number with as many digits as a label has room for."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.0e}" if float(f"{value:.0e}") == value else f"{value:.2e}"
    return f"{value:.4g}"
