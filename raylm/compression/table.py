"""The report of ``compress`` as rows: a figure before and after, its unit, which direction is better, and the ratio.

In: ``report.json`` of the stage, of a model that generates or of an encoder. Out: rows for people, which the terminal
and the report page show alike. A figure that says nothing about the model's task has no row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raylm.tasks.base import Better, Measure

BITS_PER_BYTE = Measure("bits_per_byte", "loss, bits per byte", "smaller", 4)
# Quality that changes by less than this share reads as "the same": a hundredth of it is noise of the measurement.
SAME = 0.001


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: with its unit.
        better: which direction is an improvement.
        before, after: values in that unit.
        decimals: that are shown.
    """

    name: str
    better: Better
    before: float
    after: float
    decimals: int

    @property
    def change(self) -> str:
        """``3.4x smaller``, or the difference where both are nearly alike."""
        if self.before <= 0 or self.after <= 0:
            return f"{self.after - self.before:+.{self.decimals}f}"
        ratio = self.after / self.before
        if abs(ratio - 1) < SAME:
            return "the same"
        if 0.9 < ratio < 1.1:
            return f"{100 * (ratio - 1):+.1f}%"
        return f"{ratio:.2g}x larger" if ratio >= 1 else f"{1 / ratio:.2g}x smaller"


def rows(report: dict[str, Any]) -> list[Row]:
    """The rows of a report, sizes first, then speed, then quality."""
    found: list[Row] = []

    def add(name: str, better: Better, decimals: int, read: Callable[[dict[str, Any]], float]) -> None:
        found.append(Row(name, better, read(report["before"]), read(report["after"]), decimals))

    add("weights on disk, MB", "smaller", 2, lambda side: side["weight_bytes"] / 1e6)
    add("memory after loading, MB", "smaller", 0, lambda side: side["resident_bytes"] / 1e6)
    add("peak memory, MB", "smaller", 0, lambda side: side["peak_bytes"] / 1e6)
    before = report["before"]
    for batch in before.get("tokens_per_second", ()):
        add(f"speed, {_at_a_time(batch)}, tokens/s", "larger", 0, lambda side, b=batch: side["tokens_per_second"][b])
    for batch in before.get("latency_milliseconds", ()):
        name = f"time for {batch} x {report['sequence_length']} tokens, ms"
        add(name, "smaller", 1, lambda side, b=batch: side["latency_milliseconds"][b])
    for measure in (BITS_PER_BYTE, *_task_measures()):
        if measure.key in before:
            add(measure.name, measure.better, measure.decimals, lambda side, key=measure.key: side[key])
    return found


def _task_measures() -> list[Measure]:
    """What the tasks whose models are scored on examples count."""
    from raylm.tasks import all_tasks

    return [measure for task in all_tasks() if task.evaluation is not None for measure in task.evaluation.measures]


def _at_a_time(batch: str) -> str:
    return "1 request" if batch == "1" else f"{batch} requests at once"


def notes(report: dict[str, Any]) -> list[str]:
    """What no column says: how alike the two models answer, one sentence each."""
    if (agreed := report.get("greedy_agreement")) is not None and agreed["identical_outputs"] == 1:
        return ["Greedy output: both models continue every prompt with the same text."]
    if agreed is not None:
        return [
            f"Greedy output: both models continue {agreed['identical_outputs']:.0%} of the prompts with the same text; "
            f"{agreed['tokens_before_first_difference']:.0%} of the tokens come before the first difference.",
            "One token that is nearly a tie changes all that follow it, so the loss says more about quality.",
        ]
    if (agreed := report.get("labels_agreement")) is not None:
        return [f"Both models give {agreed:.1%} of the texts the same label."]
    if "outputs_cosine" not in report or "accuracy" in report["before"]:
        # Older reports have a cosine of a classifier's logits: of few labels 1 or -1 for each text, which says nothing.
        return []
    return [
        f"Cosine between the {_compared(report)} of both models (1 is the same): {report['outputs_cosine']:.4f} on "
        f"average, {report['outputs_cosine_least']:.4f} for the text where they differ most."
    ]


def _compared(report: dict[str, Any]) -> str:
    """What the outputs are; older reports do not say it."""
    return report.get("compared") or ("scores" if "exact_match" in report["before"] else "vectors")


def table(report: dict[str, Any]) -> str:
    """Before and after as lines of text."""
    before, after = report["before"]["engine"], report["after"]["engine"]
    lines = [f"  {'':<34}{before:>18}{after:>16}  {'change':<14}better is"]
    for row in rows(report):
        values = f"{row.before:,.{row.decimals}f}", f"{row.after:,.{row.decimals}f}"
        lines.append(f"  {row.name:<34}{values[0]:>18}{values[1]:>16}  {row.change:<14}{row.better}")
    return "\n".join([*lines, *(f"  {note}" for note in notes(report))])
