"""A search over training on a page: its trials as lines over all keys, how much each key matters, and the table.

In: ``report.json`` of ``tune``. Out: HTML. The importance is fANOVA's (Hutter et al. 2014), as Optuna computes it.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylm.pages import bars, number, table
from raylm.reports.figures import short
from raylm.reports.runs import scalar

WIDTH, HEIGHT, SIDE, TOP, BOTTOM = 760, 280, 60, 40, 34
# Fewer trials say nothing of what matters.
LEAST_TRIALS = 8
# A range that spans more than this factor is drawn, and judged, by its logarithm.
WIDE = 50.0
ORDINARY = ("trial", "step", "validation_loss", "status", "failure", "lineage")
NOTE = (
    "Best first. A trial that was stopped early was behind the others at the same step; its figures are the last that "
    "it reached."
)
MEMBERS_NOTE = "Best first. A trial is a member of a population, and its values are those that it had last."

Row = dict[str, Any]


def metric_of(report: dict[str, Any]) -> str:
    """What the trials were compared by."""
    return report.get("metric", "validation_loss")


def keys_of(report: dict[str, Any]) -> list[str]:
    """The keys of the space."""
    known = {*ORDINARY, metric_of(report)}
    return list(dict.fromkeys(key for row in report["trials"] for key in row if key not in known))


def trials(report: dict[str, Any]) -> str:
    """The table of trials."""
    from raylm.tuning.results import best_first

    metric, listed = metric_of(report), []
    columns = dict.fromkeys(("validation_loss", metric))
    for row in best_first(report["trials"], metric, minimised=report.get("minimised", True)):
        status = f"failed: {row['failure']}" if "failure" in row else row["status"]
        figures = {name.replace("_", " "): _or_dash(row.get(name)) for name in columns}
        listed.append(
            {"trial": row["trial"], **{key: value_text(row.get(key)) for key in keys_of(report)},
             "steps": _or_dash(row["step"]), **figures, "status": status}
        )  # fmt: skip
    note = MEMBERS_NOTE if is_population(report) else NOTE
    return f"<div class=wide>{table(listed)}</div><p class=dim>{note}</p>"


def is_population(report: dict[str, Any]) -> bool:
    """Whether the trials were members that took over each other's checkpoints."""
    return any("lineage" in row for row in report["trials"])


def lineage(report: dict[str, Any]) -> str:
    """Of a population: the values that the best one's weights were trained with, and what each member took over."""
    if not is_population(report):
        return ""
    keys = keys_of(report)
    parts = [
        {"steps": f"{part['from_step']:,} to {part['to_step']:,}", "trial": part["trial"],
         **{key: value_text(part["values"].get(key)) for key in keys}}
        for part in report["best"].get("schedule", ())
    ]  # fmt: skip
    taken = [
        {"step": f"{one['step']:,}", "trial": row["trial"], "goes on from trial": one["trial"],
         **{key: value_text(one["values"].get(key)) for key in keys}, "had failed": one.get("failure", "–")}
        for row in sorted(report["trials"], key=lambda row: row["trial"])
        for one in row.get("lineage", ())
    ]  # fmt: skip
    if not any("failure" in one for row in report["trials"] for one in row.get("lineage", ())):
        taken = [{key: value for key, value in row.items() if key != "had failed"} for row in taken]
    shown = f"<p>What the best one's weights were trained with:</p><div class=wide>{table(parts)}</div>"
    if not taken:
        return f"{shown}<p>No member went on from another's checkpoint.</p>"
    return f"{shown}<p>Members that went on from another's checkpoint:</p><div class=wide>{table(taken)}</div>"


def importance(report: dict[str, Any]) -> dict[str, float]:
    """Share of each key in what makes trials differ, most first; empty where there are too few trials.

    Keys that only some trials have are left out.
    """
    import optuna

    if is_population(report):
        # Of what changed within training, the last values explain little.
        return {}
    rows, metric = _measured(report), metric_of(report)
    axes = [axis for axis in (_axis(key, rows) for key in keys_of(report)) if axis is not None]
    axes = [axis for axis in axes if all(row.get(axis.key) is not None for row in rows) and axis.differs]
    if len(rows) < LEAST_TRIALS or not axes or len({row[metric] for row in rows}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for row in rows:
        study.add_trial(
            optuna.trial.create_trial(
                values=[row[metric]],
                params={axis.key: axis.inside(row[axis.key]) for axis in axes},
                distributions={axis.key: axis.distribution() for axis in axes},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def importance_section(report: dict[str, Any]) -> str:
    """The importance as bars, with what it is."""
    if not (found := importance(report)):
        return ""
    shown = {key: round(share, 3) for key, share in found.items()}
    note = (
        f"How much of the differences of {metric_of(report).replace('_', ' ')} between {len(_measured(report))} trials "
        "each key explains by itself and together with others (fANOVA), as a share of 1. Of few trials it is a hint."
    )
    return f"{bars(shown)}<p class=dim>{html.escape(note)}</p>"


def parallel_coordinates(report: dict[str, Any]) -> str:
    """A line a trial over an axis a key, the metric last; the best is drawn thick, and good ones stronger than bad."""
    rows, metric = _measured(report), metric_of(report)
    axes = [axis for axis in (_axis(key, rows) for key in [*keys_of(report), metric]) if axis is not None]
    if len(rows) < 2 or len(axes) < 2:
        return ""
    left = [SIDE + (WIDTH - 2 * SIDE) * place / (len(axes) - 1) for place in range(len(axes))]
    best, minimised = report["best"]["trial"], report.get("minimised", True)
    ranked = sorted(rows, key=lambda row: row[metric], reverse=minimised)
    parts = []
    for place, row in enumerate(ranked):
        points = [
            f"{x:.1f},{_top(axis.share(row[axis.key])):.1f}"
            for x, axis in zip(left, axes, strict=True)
            if row.get(axis.key) is not None
        ]
        strength, taken = 0.15 + 0.55 * place / max(1, len(ranked) - 1), row["trial"] == best
        title = f"trial {row['trial']} ({row['status']}): {metric.replace('_', ' ')} {row[metric]:.4g}"
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="var({"--bad" if taken else "--fill"})" '
            f'stroke-width="{3 if taken else 1.5}" stroke-opacity="{1 if taken else round(strength, 2)}">'
            f"<title>{html.escape(title)}</title></polyline>"
        )
    parts += [_drawn_axis(axis, x) for x, axis in zip(left, axes, strict=True)]
    note = (
        "A line is a trial; the best one is red, and better ones are stronger. A key with a wide range is logarithmic."
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="trials by key">{"".join(parts)}</svg>'
    return f"<div class=scroll>{picture}</div><p class=dim>{note}</p>"


@dataclass(frozen=True)
class Axis:
    """One key over all trials.

    Attributes:
        values: of a key that is no number, in order; else none.
        low: the least number, and ``high`` the largest.
    """

    key: str
    values: tuple[str, ...]
    low: float
    high: float
    logarithmic: bool

    @property
    def differs(self) -> bool:
        """Whether there are two values."""
        return len(self.values) > 1 or self.high > self.low

    def share(self, value: Any) -> float:
        """Where a value stands, from 0 to 1."""
        if self.values:
            return self.values.index(value_text(value)) / max(1, len(self.values) - 1)
        if not self.differs:
            return 0.5
        low, high, at = self.low, self.high, float(value)
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low)

    def inside(self, value: Any) -> Any:
        """A value as Optuna is told it."""
        return value_text(value) if self.values else float(value)

    def distribution(self) -> Any:
        """For Optuna."""
        import optuna

        if self.values:
            return optuna.distributions.CategoricalDistribution(self.values)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.logarithmic)


def _axis(key: str, rows: Sequence[Row]) -> Axis | None:
    found = [row[key] for row in rows if row.get(key) is not None]
    if not found:
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in found):
        low, high = float(min(found)), float(max(found))
        return Axis(key, (), low, high, logarithmic=low > 0 and high / low > WIDE)
    return Axis(key, tuple(sorted({value_text(value) for value in found})), 0.0, 0.0, logarithmic=False)


def _measured(report: dict[str, Any]) -> list[Row]:
    """The trials that have a figure."""
    metric = metric_of(report)

    def has(row: Row) -> bool:
        value = row.get(metric)
        return row["status"] != "failed" and isinstance(value, int | float) and math.isfinite(value)

    return [row for row in report["trials"] if has(row)]


def _top(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _drawn_axis(axis: Axis, x: float) -> str:
    ticks = {0.0: short(axis.low), 1.0: short(axis.high)} if axis.differs else {0.5: short(axis.low)}
    if axis.values:
        ticks = {axis.share(value): value for value in axis.values}
    name = axis.key.rpartition(".")[2].replace("_", " ")
    texts = "".join(
        f'<text x="{x + 5:.1f}" y="{_top(share) + 4:.1f}">{html.escape(text[:24])}</text>'
        for share, text in ticks.items()
    )
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--dim)"/>{texts}'
        f'<text x="{x:.1f}" y="{TOP - 16}" text-anchor="middle">{html.escape(name)}</text>'
    )


def value_text(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    return number(float(f"{value:.4g}")) if isinstance(value, float) else scalar(value)


def _or_dash(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
