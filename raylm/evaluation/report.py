"""``report.html`` from any stage's run directory: curves of ``metrics.jsonl`` and tables of ``report.json``.

One file without links to others: plots are PNG images inside it.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from raylm.config.run_directory import write_atomically
from raylm.errors import UserError
from raylm.pages import page, table

AXES = ("step", "tokens", "samples", "time")


def write_html(run_directory: Path) -> Path:
    """Write ``report.html`` into ``run_directory`` and return its path; of a prepared set, its data card.

    Raises:
        UserError: the directory is no run of a stage.
    """
    if not (run_directory / "config.yaml").is_file():
        raise UserError(f"{run_directory}: is no run directory (no config.yaml)")
    path = run_directory / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if report is not None and report.get("stage") == "prepare":
        from raylm.data.card_page import write_card

        return write_card(run_directory, report)
    parts = ["<h2>Result</h2>", table(report) if report is not None else "<p>Not done yet.</p>"]
    metrics = run_directory / "metrics.jsonl"
    if metrics.exists():
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        for title, names in _groups(lines).items():
            parts.append(f"<h2>{html.escape(title)}</h2>{_plot(lines, names)}")
    configuration = html.escape((run_directory / "config.yaml").read_text(encoding="utf-8"))
    parts.append(f"<h2>Configuration</h2><pre>{configuration}</pre>")
    path = run_directory / "report.html"
    write_atomically(path, page(run_directory.name, parts))
    return path


def _groups(lines: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = {name for line in lines for name in line if name not in AXES}
    losses = [name for name in ("loss", "validation_loss") if name in names]
    return ({"loss": losses} if losses else {}) | {name: [name] for name in sorted(names - set(losses))}


def _plot(lines: list[dict[str, Any]], names: list[str]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="{names[0]}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
