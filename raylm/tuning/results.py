"""What a search over training has found: a row a trial, the best of them, its model and its file, and the table.

In: Ray Tune's results. Out: ``<run>/model``, ``<run>/best.yaml`` and what ``report.json`` holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.loading import to_yaml
from raylm.config.run_directory import RunDirectory, read_object, write_atomically
from raylm.config.stages import TuneConfig
from raylm.config.tuning import TuningSection
from raylm.errors import RunFailure
from raylm.training.checkpoints.mirror import METRICS
from raylm.training.reports.metrics import read_metrics
from raylm.tuning.population.rows import LINEAGE, SCHEDULE, lineage_text, values_text
from raylm.tuning.search import FAILURE, FINISHED, TRIAL, TURN, reason, trial_config, trial_directory, trial_number
from raylm.tuning.space import is_minimised

if TYPE_CHECKING:
    from ray.tune import Result

BEST = "best.yaml"
# In the order of a table.
ENDS = ("running", "waiting", "finished", "stopped", "failed")

Row = dict[str, Any]


def make_rows(results: Iterable[Result], tuning: TuningSection) -> list[Row]:
    """A row a trial, by number: its candidate, how far it came, the figures of its exported weights, and how it ended.

    One that was stopped early has the last figures that it reached, one that failed the reason.
    """
    rows: dict[int, Row] = {}
    # Of the parts of a trial the last one counts.
    for result in sorted(results, key=lambda result: ((result.config or {}).get(TURN) or [0, 0])[1]):
        metrics, failure = result.metrics or {}, None
        if result.error or FAILURE in metrics:
            failure = metrics.get(FAILURE) or reason(result.error)
        number = trial_number(Path(result.path).name)
        rows[number] = {
            "trial": number,
            **{key: (result.config or {}).get(key) for key in tuning.space},
            "step": metrics.get("step"),
            **{name: metrics.get(name) for name in dict.fromkeys(("validation_loss", str(tuning.metric)))},
            "status": "failed" if failure else "finished" if metrics.get(FINISHED) else "stopped",
            **({FAILURE: failure} if failure else {}),
        }
    return [rows[number] for number in sorted(rows)]


def rows_so_far(trials: Path, tuning: TuningSection) -> list[Row]:
    """The rows of a search that goes on, of what its trials have written; the last figures of each.

    Args:
        trials: directory of the trials; it need not be there yet.
    """
    rows = []
    for path in sorted(trials.glob(f"*/{TRIAL}")):
        found, lines = read_object(path) or {}, read_metrics(path.parent / METRICS)
        if found.get("status") not in ENDS or not isinstance(found.get("candidate"), dict):
            continue
        evaluated = next((line for line in reversed(lines) if "validation_loss" in line), {})
        rows.append(
            {
                "trial": trial_number(path.parent.name),
                **{key: found["candidate"].get(key) for key in tuning.space},
                "step": lines[-1]["step"] if lines else None,
                **{name: evaluated.get(name) for name in dict.fromkeys(("validation_loss", str(tuning.metric)))},
                "status": found["status"],
            }
        )
    return rows


def best_of(rows: list[Row], tuning: TuningSection) -> Row:
    """The finished trial that is best in the metric.

    Raises:
        RunFailure: none finished; with the reason of the first.
    """
    if not (finished := [row for row in rows if row["status"] == "finished"]):
        first = next((row for row in rows if FAILURE in row), None)
        why = f"; trial {first['trial']}: {first[FAILURE]}" if first else ""
        raise RunFailure(f"no trial finished{why}")
    return min(finished, key=lambda row: goodness(row, tuning))


def goodness(row: Row, tuning: TuningSection) -> float:
    """The metric of a trial, smaller where it is better."""
    return row[str(tuning.metric)] * (1 if is_minimised(tuning) else -1)


def export_best(run: RunDirectory, config: TuneConfig, best: Row) -> None:
    """Make the best trial's model ``<run>/model``, and write the file that trains it again."""
    partial = run.path / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(trial_directory(run.path, best["trial"]) / "model", partial)
    shutil.rmtree(run.path / "model", ignore_errors=True)
    partial.rename(run.path / "model")
    trained = read_object(trial_directory(run.path, best["trial"]) / TRIAL)
    assert trained is not None
    found = trial_config(config, trained["candidate"])
    named = found.model_copy(update={"run": found.run.model_copy(update={"name": f"{config.run.name}-best"})})
    title = f"# The best of {config.run.name}'s trials, number {best['trial']}: raylm finetune {BEST}\n"
    write_atomically(run.path / BEST, title + _changes(best) + to_yaml(named))


def _changes(best: Row) -> str:
    """With the scheduler pbt: the values that the best one's weights were trained with, as comments."""
    parts = [
        f"#   steps {part['from_step']} to {part['to_step']}, trial {part['trial']}: {values_text(part['values'])}"
        for part in best.get(SCHEDULE, ())
    ]
    head = "# Its values changed within training; this file has the last ones, from the first step on. They were:"
    return "".join(f"{line}\n" for line in [head, *parts]) if parts else ""


def counted(rows: list[Row]) -> str:
    """How many trials there were, and how they ended."""
    ends = [row["status"] for row in rows]
    words = [f"{ends.count(end)} {end}" for end in ("finished", "stopped", "failed") if end in ends]
    return f"{len(rows)} trial{'s' if len(rows) != 1 else ''}: {', '.join(words)}"


def describe(run: RunDirectory, report: dict[str, Any], tuning: TuningSection) -> str:
    """The trials, the best of them and where the results lie, for people."""
    best, metric = report["best"], str(tuning.metric)
    unit = " nats a target" if metric == "validation_loss" else ""
    again = f"  again      raylm finetune {run.path / BEST}\n" if (run.path / BEST).is_file() else ""
    return (
        f"{trials_table(report['trials'], tuning)}\n"
        f"  best       trial {best['trial']}, {metric.replace('_', ' ')} {best[metric]:.4f}{unit}\n"
        f"  model      {run.path / 'model'}, a copy of the best trial's\n"
        f"{again}"
        f"  trials     {run.path / 'trials'}; one page of all: raylm report {run.path}"
    )


def trials_table(rows: list[Row], tuning: TuningSection) -> str:
    """The trials as lines of text, best first; a stopped one's figures are the last that it reached."""
    metrics = list(dict.fromkeys(("validation_loss", str(tuning.metric))))
    columns = ["trial", *tuning.space, "step", *metrics]
    heads = ["trial", *tuning.space, "steps", *[name.replace("_", " ") for name in metrics], *_taken(rows), "status"]
    lines = [
        [
            *[cell(row.get(column)) for column in columns],
            *_taken(rows, row),
            f"failed: {row[FAILURE]}" if FAILURE in row else row["status"],
        ]
        for row in best_first(rows, str(tuning.metric), minimised=is_minimised(tuning))
    ]
    return aligned([heads, *lines])


def live_table(rows: list[Row], tuning: TuningSection) -> str:
    """The same while the search goes on, for a narrow terminal: those that run first, keys by their last part."""
    ends = [key.rpartition(".")[2] for key in tuning.space]
    names = [end if ends.count(end) == 1 else key for key, end in zip(tuning.space, ends, strict=True)]
    metric = str(tuning.metric)
    lines = [
        [*[cell(row.get(column)) for column in ("trial", "status", "step", metric, *tuning.space)], *_taken(rows, row)]
        for row in best_first(rows, metric, minimised=is_minimised(tuning))
    ]
    return aligned([["trial", "", "step", metric.removeprefix("validation_"), *names, *_taken(rows)], *lines])


def _taken(rows: list[Row], row: Row | None = None) -> list[str]:
    """Of a population: the column of what members took over, its head or that of a ``row``; else no column."""
    if not any(LINEAGE in one for one in rows):
        return []
    return ["went on from"] if row is None else [lineage_text(row) or "-"]


def aligned(cells: list[list[str]]) -> str:
    """Lines of cells as columns of text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def best_first(rows: list[Row], metric: str = "validation_loss", *, minimised: bool = True) -> list[Row]:
    """The trials by the metric: finished ones, then stopped ones, then failed ones and those without a figure."""
    sign = 1 if minimised else -1

    def place(row: Row) -> tuple[int, bool, float]:
        value = row.get(metric)
        return ENDS.index(row["status"]), value is None, sign * (value or 0.0)

    return sorted(rows, key=place)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
