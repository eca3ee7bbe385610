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

# As users wait for them; of a report of an older raylm the first alone.
SPEEDS = {
    "tokens_per_second": "speed",
    "prefill_tokens_per_second": "of the prompt",
    "decode_tokens_per_second": "of the answer",
}


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
        larger, by = ratio >= 1, max(ratio, 1 / ratio)
        return f"{by:{'.2g' if by < 100 else ',.0f'}}x {'larger' if larger else 'smaller'}"


def rows(report: dict[str, Any]) -> list[Row]:
    """The rows of a report, sizes first, then speed, then quality."""
    found: list[Row] = []

    def add(name: str, better: Better, decimals: int, read: Callable[[dict[str, Any]], float]) -> None:
        found.append(Row(name, better, read(report["before"]), read(report["after"]), decimals))

    before = report["before"]
    if "parameters" in before and before["parameters"] != report["after"]["parameters"]:
        add("parameters, millions", "smaller", 2, lambda side: side["parameters"] / 1e6)
    add("weights on disk, MB", "smaller", 2, lambda side: side["weight_bytes"] / 1e6)
    add("memory after loading, MB", "smaller", 0, lambda side: side["resident_bytes"] / 1e6)
    add("peak memory, MB", "smaller", 0, lambda side: side["peak_bytes"] / 1e6)
    for key, name in SPEEDS.items():
        for batch in before.get(key, ()):
            add(f"{name}, {_at_a_time(batch)}, tokens/s", "larger", 0, lambda side, k=key, b=batch: side[k][b])
    for batch in before.get("latency_milliseconds", ()):
        name = f"time for {batch} x {report['sequence_length']} tokens, ms"
        add(name, "smaller", 1, lambda side, b=batch: side["latency_milliseconds"][b])
    for place, where in (("", ""), ("outside_", "outside: ")):
        for measure in _quality_measures():
            if (key := f"{place}{measure.key}") in before:
                add(f"{where}{measure.name}", measure.better, measure.decimals, lambda side, k=key: side[k])
    return found


def _at_a_time(batch: str) -> str:
    return "1 request" if batch == "1" else f"{batch} requests at once"


def notes(report: dict[str, Any]) -> list[str]:
    """What no column says: how alike the two models answer, one sentence each."""
    return [*_same_texts(report), *_alike(report)]


def _same_texts(report: dict[str, Any]) -> list[str]:
    """Of a model that is scored on pairs."""
    if (same := report.get("same_texts")) is None:
        return []
    return [f"The export writes the same text as {_made_from(report)} to {same:.1%} of the sources."]


def _alike(report: dict[str, Any]) -> list[str]:
    # Reports of an older raylm have it at the top.
    agreed = report["after"].get("greedy_agreement") or report.get("greedy_agreement")
    if agreed is not None and agreed["identical_outputs"] == 1:
        return ["Greedy output: both models continue every prompt with the same text.", *_sure(report)]
    if agreed is not None:
        return [
            *_sure(report),
            f"Greedy output: both models continue {agreed['identical_outputs']:.0%} of the prompts with the same text; "
            f"{agreed['tokens_before_first_difference']:.0%} of the tokens come before the first difference.",
            "One token that is nearly a tie changes all that follow it, so the loss says more about quality.",
        ]
    if (agreed := report.get("labels_agreement")) is not None:
        return [f"The export gives {agreed:.1%} of the texts the same label as {_made_from(report)}."]
    if (agreed := report.get("tags_agreement")) is not None:
        return [f"The export gives {agreed:.1%} of the words the same tag as {_made_from(report)}."]
    if "outputs_cosine" not in report or "accuracy" in report["before"]:
        # Older reports have a cosine of a classifier's logits: of few labels 1 or -1 for each text, which says nothing.
        return []
    return [
        f"Cosine between the {_compared(report)} of the export and of {_made_from(report)} (1 is the same): "
        f"{report['outputs_cosine']:.4f} on average, {report['outputs_cosine_least']:.4f} for the text where they "
        "differ most."
    ]


def _sure(report: dict[str, Any]) -> list[str]:
    """How much larger the loss is, and how sure that is; older reports do not say it."""
    found = []
    for place, where in (("", ""), ("outside_", " outside")):
        if (ends := report["after"].get(f"{place}bits_per_byte_ratio_interval")) is not None:
            low, high = (100 * (end - 1) for end in ends)
            found.append(f"Loss{where} over the original's: {low:+.2f}% to {high:+.2f}% (95% interval, the same text).")
    return found


def _made_from(report: dict[str, Any]) -> str:
    """What the export is compared with: where there were steps before it, not the original."""
    return "the model before the last step" if len(report.get("steps") or []) > 1 else "the original"


def _compared(report: dict[str, Any]) -> str:
    """What the outputs are; older reports do not say it."""
    return report.get("compared") or ("scores" if "exact_match" in report["before"] else "vectors")


def table(report: dict[str, Any]) -> str:
    """Before and after as lines of text."""
    before, after = report["before"]["engine"], report["after"]["engine"]
    lines = [f"  {'':<38}{before:>18}{after:>18}  {'change':<14}better is"]
    for row in rows(report):
        values = f"{row.before:,.{row.decimals}f}", f"{row.after:,.{row.decimals}f}"
        lines.append(f"  {row.name:<38}{values[0]:>18}{values[1]:>18}  {row.change:<14}{row.better}")
    return "\n".join([*lines, *(f"  {note}" for note in [*notes(report), *chain(report)])])


def chain(report: dict[str, Any]) -> list[str]:
    """What each step of several made of the model, a line each."""
    shown = {"parameters, millions", "weights on disk, MB", *(measure.name for measure in _quality_measures())}
    found = []
    for step in report.get("steps", ()):
        if (figures := step.get("figures")) is None:
            continue
        parts = [
            f"{row.name} {row.after:,.{row.decimals}f}"
            for row in rows(report | {"after": figures})
            if row.name in shown or row.name.startswith(("speed, 1 ", "time for 1 "))
        ]
        found.append(f"after {step['describe']}: {'; '.join(parts)}")
    return found


def _quality_measures() -> list[Measure]:
    """Bits per byte, and what the tasks whose models are scored on examples count."""
    from raylm.tasks import all_tasks

    tasks = [task.evaluation.measures for task in all_tasks() if task.evaluation is not None]
    return [BITS_PER_BYTE, *(measure for measures in tasks for measure in measures)]
