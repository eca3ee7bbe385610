"""Quality against size and against speed: the forms of a compressed model, or the trials of a search, as points.

In: ``report.json`` of ``compress``, or of ``tune`` over ways to compress, and points of other tools. Out: HTML.
"""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from raylm.errors import UserError
from raylm.pages import scatter, table

NAMES = {
    "quality": "quality, smaller is better",
    "megabytes": "weights on disk, MB",
    "p50_milliseconds": "ms a token or text",
}
BESIDE = ("quality", "quality_ratio", "megabytes", "p50_milliseconds")


def plots(rows: list[dict[str, Any]], marked: set[Any]) -> str:
    """Quality over size and over time.

    Args:
        rows: with ``name``, and the figures that are known.
        marked: names of the rows that no other one is better than.
    """
    found = []
    for across in ("megabytes", "p50_milliseconds"):
        points = [
            (row[across], row["quality"], str(row["name"]), row["name"] in marked)
            for row in rows
            if isinstance(row.get(across), int | float) and isinstance(row.get("quality"), int | float)
        ]
        if len(points) > 1:
            found.append(scatter(points, NAMES[across], NAMES["quality"]))
    return f"<div class=charts>{''.join(found)}</div>" if found else ""


def read_beside(path: Path) -> list[dict[str, Any]]:
    """Points of other tools: a JSON list of objects with ``name``, figures by the names of a search's objectives, and
    instead of ``quality`` perhaps ``quality_ratio``, that of the model over that of its original in the same tool.

    Raises:
        UserError: the file cannot be read, or an entry is no such point; names it.
    """
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: found no points, allowed: a JSON list of objects")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise UserError(f"{path}: entry {number}: found no object with a name")
        for key, value in row.items():
            figure = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if key in BESIDE and not (figure and value > 0):
                raise UserError(f"{path}: entry {number}: {key}: found {json.dumps(value)}, allowed: a number above 0")
        if not ({"quality", "quality_ratio"} & row.keys() and {"megabytes", "p50_milliseconds"} & row.keys()):
            raise UserError(
                f"{path}: entry {number}: found {', '.join(row)}; needed: quality or quality_ratio, and megabytes or "
                "p50_milliseconds"
            )
    return rows


def _beside(rows: list[dict[str, Any]], original: dict[str, Any]) -> list[dict[str, Any]]:
    """Such points with their quality as the report counts it."""
    known = original.get("quality")
    return [
        row if "quality" in row or known is None else row | {"quality": row["quality_ratio"] * known} for row in rows
    ]


def search(report: dict[str, Any], beside: list[dict[str, Any]]) -> str:
    """All trials of a search and the original, as points and as a table; in the plots also what is ``beside``."""
    picked, front = report["best"]["trial"], set(report["front"])
    rows = [{"name": "original", **report["original"]}]
    rows += [{"name": row["trial"], **row} for row in report["trials"]]
    keys = [key for key in report["trials"][0] if key.startswith(("compression.", "training.", "objective."))]
    listed = [
        {
            "trial": str(row["name"]),
            **{key.removeprefix("compression.steps."): _shown(row.get(key)) for key in keys},
            **{NAMES[name]: _shown(row.get(name)) for name in report["objectives"]},
            "": "taken" if row["name"] == picked else "front" if row["name"] in front else row.get("status", ""),
        }
        for row in rows
    ]
    note = "The front: of these trials none is at least as good as another in everything and better in one thing."
    drawn = plots([*rows, *_beside(beside, report["original"])], front)
    return f"{drawn}<div class=wide>{table(listed)}</div><p class=dim>{html.escape(note)}</p>"


def forms(report: dict[str, Any], beside: list[dict[str, Any]]) -> str:
    """The original, what each step made, the result, and what is ``beside``."""
    sides = [("original", report["before"])]
    sides += [(step["describe"], step["figures"]) for step in report.get("steps", ()) if "figures" in step]
    rows = [row_of(name, figures) for name, figures in [*sides, ("result", report["after"])]]
    return plots([*rows, *_beside(beside, rows[0])], {"original", "result"})


def row_of(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """One form with its figures by the names of a search's objectives; those that its task has."""
    from raylm.tasks import all_tasks

    row: dict[str, Any] = {"name": name, "megabytes": figures["weight_bytes"] / 1e6}
    if "bits_per_byte" in figures:
        return row | {"quality": figures["bits_per_byte"], "p50_milliseconds": 1e3 / figures["tokens_per_second"]["1"]}
    first = [task.evaluation.measures[0] for task in all_tasks() if task.evaluation is not None]
    measure = next((one for one in first if one.key in figures), None)
    if measure is not None:
        row["quality"] = figures[measure.key] * (1 if measure.better == "smaller" else -1)
    if "latency_milliseconds" in figures:
        row["p50_milliseconds"] = figures["latency_milliseconds"]["1"]
    return row


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
