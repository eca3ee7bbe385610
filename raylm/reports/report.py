"""``raylm report``: a page about one run of any stage, or about several side by side. One file, nothing from outside.

Works as well for a run that is still going or that failed: what is known so far stands on the page.
"""

from __future__ import annotations

import html
from pathlib import Path

import yaml

from raylm.config.run_directory import write_atomically
from raylm.errors import UserError
from raylm.pages import page, table, tiles
from raylm.reports.charts import COLOURS, MARKS, SCRIPT, STYLE, Mark, Series, chart, legend, slider
from raylm.reports.facts import definitions, events_table, headline, sections
from raylm.reports.figures import FIGURES, is_worth_drawing, points
from raylm.reports.runs import Run, differing, open_runs, shown_configuration
from raylm.reports.trade_offs import read_beside

NAME = "report.html"
STATUS_CLASSES = ("done", "failed", "running", "interrupted")


def write_report(paths: list[Path], output: Path | None = None, beside: Path | None = None) -> Path:
    """Write the page about the runs at ``paths`` and return its path.

    Args:
        output: the file; by default ``report.html`` in the run's directory, and of several runs in the current one.
        beside: JSON file of other tools' points for the plots of one run of ``compress``, or of ``tune`` over ways to
            compress; see :func:`raylm.reports.trade_offs.read_beside`.

    Raises:
        UserError: a path is no run directory, the points are none, or the file cannot be written.
    """
    runs = open_runs(paths)
    if beside is not None:
        if len(runs) > 1 or (runs[0].stage != "compress" and "front" not in (runs[0].report or {})):
            raise UserError("--beside: allowed with one finished run that compressed, or that searched over it")
        runs[0].beside = read_beside(beside)
    if len(runs) == 1:
        target = output or runs[0].path / NAME
        if runs[0].stage == "prepare":
            from raylm.data.prepare.card_page import write_card

            if runs[0].report is not None:
                return write_card(runs[0].path, runs[0].report, target)
        content = single_page(runs[0])
    else:
        target = output or Path(NAME)
        for run in runs:
            if run.stage == "prepare":
                raise UserError(f"{run.path}: is a prepared set, whose data card stands alone; leave it out")
        content = comparison_page(runs)
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    return target


def single_page(run: Run) -> str:
    """The page about one run."""
    parts = [_heading(run), tiles(headline(run))]
    if run.report is None and not run.metrics and not run.trials:
        parts.append("<p>Nothing has been measured yet.</p>")
    if run.stage == "tune":
        parts += _curves_of_several(list(run.trials.values()))
    else:
        parts += _curves_of_one(run)
    for title, content in sections(run).items():
        if content:
            parts.append(f"<h2>{title}</h2>{content}")
    text = yaml.safe_dump(shown_configuration(run.config), sort_keys=False, allow_unicode=True, width=100)
    note = "<p class=dim>Without what is not set and what the run did not use; all of it stands in config.yaml.</p>"
    parts.append(f"<h2>Configuration</h2>{note}<pre>{html.escape(text)}</pre>")
    title = run.label if run.label == run.stage else f"{run.stage}: {run.label}"
    return page(title, [*parts, _script()], STYLE)


def comparison_page(runs: list[Run]) -> str:
    """The page about several runs: their figures side by side, where their configurations differ, curves overlaid."""
    parts = [_figures_table(runs), *_curves_of_several([_with_curves(run) for run in runs])]
    differences = [
        {"key": key, **dict(zip((run.label for run in runs), values, strict=True))}
        for key, values in differing(runs).items()
    ]
    parts.append("<h2>Where the configurations differ</h2>")
    parts.append(
        f"<div class=wide>{table(differences)}</div>" if differences else "<p>Nowhere but in name and place.</p>"
    )
    if events := events_table(runs):
        parts.append(f"<h2>Events</h2>{events}")
    places = definitions({run.label: str(run.path.resolve()) for run in runs})
    parts.append(f"<h2>Run directories</h2>{places}")
    return page(f"{len(runs)} runs", [*parts, _script()], STYLE)


def _heading(run: Run) -> str:
    kind = run.status if run.status in STATUS_CLASSES else ""
    failure = next((event["text"] for event in reversed(run.events) if event["kind"] == "failure"), None)
    why = f"<p>{html.escape(failure)}</p>" if run.status == "failed" and failure else ""
    place = f"<span class=dim>{html.escape(str(run.path.resolve()))}</span>"
    return f"<p><span class='badge {kind}'>{run.status}</span> {place}</p>{why}"


def _curves_of_one(run: Run) -> list[str]:
    """Training and validation loss share a chart; every other metric has its own."""
    marks = _marks([run])
    charts = []
    losses = [(figure, points(run.metrics, figure)) for figure in FIGURES[:2]]
    series = [
        Series(figure.title.removesuffix(" loss"), found, colour)
        for colour, (figure, found) in enumerate(losses)
        if found
    ]
    if is_worth_drawing(FIGURES[0], [one.points for one in series]):
        charts.append(chart(FIGURES[0], series, marks, "loss", named=True))
    for figure in FIGURES[2:]:
        found = points(run.metrics, figure)
        if is_worth_drawing(figure, [found]):
            charts.append(chart(figure, [Series(figure.title, found, 0)], marks))
    return _section_of(charts)


def _curves_of_several(runs: list[Run]) -> list[str]:
    """One chart a metric, one curve a run."""
    charts = []
    for figure in FIGURES:
        series = [
            Series(run.label, found, number % COLOURS)
            for number, run in enumerate(runs)
            if (found := points(run.metrics, figure))
        ]
        if is_worth_drawing(figure, [one.points for one in series]):
            charts.append(chart(figure, series, _marks(runs) if len(runs) < COLOURS else []))
    return _section_of(charts, legend([run.label for run in runs]))


def _section_of(charts: list[str], keys: str = "") -> list[str]:
    if not charts:
        return []
    note = "<p class=dim>By training step. Point at a curve for the values as they were logged.</p>"
    return [f"<h2>Curves</h2>{note}{slider()}{keys}<div class=charts>{''.join(charts)}</div>"]


def _marks(runs: list[Run]) -> list[Mark]:
    several = len(runs) > 1
    return [
        Mark(event["step"], event["kind"], f"{run.label}: {event['text']}" if several else event["text"])
        for run in runs
        for event in run.events
        if event["kind"] in MARKS
    ]


def _with_curves(run: Run) -> Run:
    """The run itself; of a search its best trial, or the one that came furthest."""
    if run.stage != "tune" or not run.trials:
        return run
    best = run.report["best"]["trial"] if run.report is not None else None
    trial = run.trials.get(best) or max(run.trials.values(), key=lambda t: len(t.metrics))
    trial.label = f"{run.label} ({trial.label})"
    return trial


def _figures_table(runs: list[Run]) -> str:
    found = [{"stage": run.stage, "status": run.status, **headline(run)} for run in runs]
    names = dict.fromkeys(name for values in found for name in values)
    rows = [
        {"": name, **{run.label: values.get(name, "–") for run, values in zip(runs, found, strict=True)}}
        for name in names
    ]
    return f"<div class=wide>{table(rows)}</div>"


def _script() -> str:
    return f"<script>{SCRIPT}</script>"
