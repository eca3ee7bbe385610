"""A classifier's confusion matrix on the report page."""

from __future__ import annotations

import html
from typing import Any

from raylm.pages import folded, table

# Labels of which the matrix still fits a page; of more the most frequent confusions are listed.
MOST_LABELS = 20
MOST_PAIRS = 30


def confusion(report: dict[str, Any]) -> str:
    """The matrix, rows by the texts' own label; empty where the report has none."""
    rows = report.get("confusion")
    if not isinstance(rows, dict) or not rows:
        return ""
    labels = list(dict.fromkeys([*report.get("labels", {}), *rows, *(given for row in rows.values() for given in row)]))
    if len(labels) > MOST_LABELS:
        return folded(f"the most frequent confusions of {len(labels)} labels", _pairs(rows))
    head = "".join(f"<th>{html.escape(label)}" for label in labels)
    body = "".join(f"<tr><th>{html.escape(label)}{_row(label, labels, rows.get(label, {}))}" for label in labels)
    note = "<p class=dim>A row for each label of the texts, a column for each label that was given.</p>"
    return f"{note}<div class=wide><table><tr><th>{head}{body}</table></div>"


def _row(label: str, labels: list[str], counts: dict[str, int]) -> str:
    total = max(1, sum(counts.values()))
    cells = []
    for given in labels:
        count = counts.get(given, 0)
        colour = "var(--good)" if given == label else "var(--bad)"
        shade = (
            f' style="background:color-mix(in srgb,{colour} {round(60 * count / total)}%,transparent)"' if count else ""
        )
        cells.append(f'<td class=number title="{count / total:.1%}"{shade}>{count:,}')
    return "".join(cells)


def _pairs(rows: dict[str, dict[str, int]]) -> str:
    wrong = [(count, label, given) for label, row in rows.items() for given, count in row.items() if given != label]
    listed = []
    for count, label, given in sorted(wrong, reverse=True)[:MOST_PAIRS]:
        share = round(100 * count / sum(rows[label].values()), 1)
        listed.append({"label": label, "given": given, "texts": count, "of the label's, %": share})
    return table(listed) if listed else "<p>None.</p>"
