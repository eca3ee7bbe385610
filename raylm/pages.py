"""Pieces of self-contained HTML pages: tables, bars, histograms, curves. All text is escaped, charts are inline SVG and
CSS, and nothing links to anything else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root{--ink:#1c2330;--dim:#667085;--line:#e4e7ec;--back:#f8f9fb;--fill:#3b6fb6;--soft:#c9daf0;--page:#fff;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#98a2b3;--line:#2b323d;--back:#1d232d;--fill:#6fa3e8;
--soft:#35506f;--page:#14181f}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif;color:var(--ink);
background:var(--page);max-width:62em;margin:2em auto 5em;padding:0 1.2em}
h1{font-size:1.7em;margin:0}h2{font-size:1.2em;margin:2.2em 0 .6em;padding-top:.6em;border-top:1px solid var(--line)}
h3{font-size:1em;margin:1.4em 0 .4em}p{margin:.4em 0}.dim{color:var(--dim)}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.25em 1em .25em 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}th{font-weight:600}td.number{text-align:right;font-variant-numeric:tabular-nums}
td td,td th{border-bottom:0}code,pre{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
pre{background:var(--back);padding:1em;overflow-x:auto;border-radius:6px}
.tiles{display:flex;flex-wrap:wrap;gap:.8em;margin:1.2em 0}.tile{background:var(--back);border-radius:8px;
padding:.7em 1.1em;min-width:8.5em}.tile b{display:block;font-size:1.4em;font-weight:600}
.tile span{color:var(--dim);font-size:.88em}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:.25em .8em;align-items:center;margin:.6em 0}
.bars i{display:block;height:1em;background:var(--fill);border-radius:3px;min-width:1px}
.bars i.soft{background:var(--soft)}.bars span{font-variant-numeric:tabular-nums;text-align:right}
svg{width:100%;height:auto;display:block;margin:.6em 0}svg text{font-size:11px;fill:var(--dim)}
blockquote{margin:.4em 0;padding:.5em .9em;background:var(--back);border-left:3px solid var(--soft);
white-space:pre-wrap;overflow-wrap:anywhere;border-radius:0 6px 6px 0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.8em}
details{margin:.3em 0}summary{cursor:pointer}img{width:100%}
.scroll{overflow-x:auto}.scroll>svg{min-width:34em}
@media(max-width:40em){.pair{grid-template-columns:1fr}body{margin:1em auto 3em}.tile{min-width:7em;padding:.5em .8em}
table{display:block;max-width:100%;overflow-x:auto}.bars{gap:.25em .5em}}
"""
WIDTH, HEIGHT, LEFT, BOTTOM = 900, 210, 60, 34
WIDEST = 90.0


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page; ``style`` is CSS beside that of all pages."""
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    )
    return "\n".join([head, f"<h1>{html.escape(title)}</h1>", *parts, "</html>"])


def number(value: float | int) -> str:
    """A number as people read it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:,} bytes"


def tiles(values: Mapping[str, str]) -> str:
    """The figures that matter most, side by side."""
    found = "".join(
        f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in values.items()
    )
    return f"<div class=tiles>{found}</div>"


def table(value: Any) -> str:
    """Any JSON value: objects as two columns, lists of objects as rows, the rest as text."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        columns = list(dict.fromkeys(key for row in value for key in row))
        head = "".join(f"<th>{html.escape(str(column))}" for column in columns)
        rows = "".join("<tr>" + "".join(_cell(row.get(column, "")) for column in columns) for row in value)
        return f"<table><tr>{head}{rows}</table>"
    if isinstance(value, dict):
        rows = "".join(f"<tr><th>{html.escape(str(key))}{_cell(item)}" for key, item in value.items())
        return f"<table>{rows}</table>"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else html.escape(str(value))


def _cell(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"<td{' class=number' if is_number else ''}>{table(value)}"


def bars(values: Mapping[str, float | int], soft: Sequence[str] = ()) -> str:
    """A horizontal bar for each value; those named in ``soft`` are pale."""
    most = max([*values.values(), 1e-12])
    rows = "".join(
        f"<div>{html.escape(name)}</div><div><i{' class=soft' if name in soft else ''} "
        f'style="width:{100 * value / most:.2f}%"></i></div><span>{number(value)}</span>'
        for name, value in values.items()
    )
    return f"<div class=bars>{rows}</div>"


def histogram(labels: Sequence[str], counts: Sequence[int], unit: str) -> str:
    """Columns of ``counts``; ``labels`` are what each begins with, ``unit`` what they count."""
    most, step = max([*counts, 1]), min(WIDEST, (WIDTH - LEFT) / max(1, len(counts)))
    every = max(1, math.ceil(len(counts) / 14))
    marks = []
    for place, (label, count) in enumerate(zip(labels, counts, strict=True)):
        x, height = LEFT + place * step, (HEIGHT - BOTTOM - 12) * count / most
        title = f"<title>from {html.escape(label)} {html.escape(unit)}: {number(count)}</title>"
        marks.append(
            f'<rect x="{x + 1:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" width="{max(1.0, step - 2):.1f}" '
            f'height="{height:.1f}" fill="var(--fill)">{title}</rect>'
        )
        if place % every == 0:
            marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}">{html.escape(label)}</text>')
    return _chart("".join(marks), {0.0: "0", 1.0: number(most)}, unit)


def curve(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> str:
    """A line through ``points``, both axes logarithmic."""
    if len(points) < 2:
        return ""
    xs, ys = ([math.log10(max(value, 1e-12)) for value in values] for values in zip(*points, strict=True))
    spans = [(min(values), max(max(values) - min(values), 1e-9)) for values in (xs, ys)]
    places = " ".join(
        f"{LEFT + (WIDTH - LEFT - 10) * (x - spans[0][0]) / spans[0][1]:.1f},"
        f"{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 12) * (y - spans[1][0]) / spans[1][1]:.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    marks = [f'<polyline points="{places}" fill="none" stroke="var(--fill)" stroke-width="2"/>']
    for power in range(math.ceil(spans[0][0]), math.floor(sum(spans[0])) + 1):
        x = LEFT + (WIDTH - LEFT - 10) * (power - spans[0][0]) / spans[0][1]
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}">{10**power:,}</text>')
    ticks = {0.0: number(points[-1][1]), 1.0: number(points[0][1])}
    return _chart("".join(marks), ticks, f"{x_name} (across), {y_name} (up), logarithmic")


def scatter(points: Sequence[tuple[float, float, str, bool]], x_name: str, y_name: str) -> str:
    """Points by two figures; those that are marked are filled and joined by a line.

    Args:
        points: across, up, a name, and whether the point is marked.
    """
    if not points:
        return ""
    spans = [_span([point[axis] for point in points]) for axis in (0, 1)]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + 10 + (WIDTH - LEFT - 30) * (x - spans[0][0]) / spans[0][1],
            HEIGHT - BOTTOM - 10 - (HEIGHT - BOTTOM - 32) * (y - spans[1][0]) / spans[1][1],
        )

    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _, marked in sorted(points) if marked)
    marks = [f'<polyline points="{line}" fill="none" stroke="var(--fill)" stroke-dasharray="3 3"/>']
    for x, y, name, marked in points:
        left, top = place(x, y)
        title = f"<title>{html.escape(name)}: {number(x)}, {number(y)}</title>"
        fill = "var(--fill)" if marked else "none"
        marks.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{fill}" stroke="var(--fill)">{title}</circle>'
            f'<text x="{left + 8:.1f}" y="{top + 4:.1f}">{html.escape(name)}</text>'
        )
    for share in (0.0, 0.5, 1.0):
        value = spans[0][0] + share * spans[0][1]
        x = place(value, spans[1][0])[0]
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{number(value)}</text>')
    ticks = {share: number(spans[1][0] + share * spans[1][1]) for share in (0.0, 1.0)}
    return _chart("".join(marks), ticks, f"{x_name} (across), {y_name} (up)")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The least of the values, and how far they reach."""
    least = min(values)
    return least, max(values) - least or abs(least) or 1.0


def _chart(marks: str, ticks: Mapping[float, str], caption: str) -> str:
    """Axes around ``marks``; ``ticks`` from the height, 0 to 1, to what stands there."""
    axis = HEIGHT - BOTTOM
    lines = "".join(
        f'<text x="{LEFT - 6}" y="{axis - (axis - 12) * share + 4:.1f}" text-anchor="end">{html.escape(text)}</text>'
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{axis - (axis - 12) * share:.1f}" y2="{axis - (axis - 12) * share:.1f}" '
        'stroke="var(--line)"/>'
        for share, text in ticks.items()
    )
    name = f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(caption)}</text>'
    return f'<div class=scroll><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{lines}{marks}{name}</svg></div>'


def quote(text: str) -> str:
    """Text from outside."""
    return f"<blockquote>{html.escape(text)}</blockquote>"


def side_by_side(left: tuple[str, str], right: tuple[str, str]) -> str:
    """Two texts, each with what it is called."""
    cells = "".join(f"<div><div class=dim>{html.escape(name)}</div>{quote(text)}</div>" for name, text in (left, right))
    return f"<div class=pair>{cells}</div>"


def folded(summary: str, content: str) -> str:
    """``content`` that opens on a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"
