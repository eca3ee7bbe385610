"""The model card of a compressed model: ``README.md`` of its directory, as model hubs show it.

Metadata by https://huggingface.co/docs/hub/model-cards. In: the report of the stage. Out: Markdown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import raylm
from raylm.compression.table import chain, notes, rows

NAME = "README.md"


def write_card(directory: Path, report: dict[str, Any]) -> None:
    """Put the card into a model ``directory``; one that was copied from the original is of another model."""
    (directory / NAME).write_text(card(report), encoding="utf-8")


def card(report: dict[str, Any]) -> str:
    """The text of the card."""
    metadata = {"library_name": "transformers", "base_model": report["model"], "tags": ["raylm", "compressed"]}
    before, after = report["before"]["engine"], report["after"]["engine"]
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        "# A compressed model",
        "",
        f"Made from `{report['model']}` by raylm {raylm.__version__}. `openvino/` has the form that was measured.",
        "",
        "## Steps",
        "",
    ]
    for number, step in enumerate(report["steps"], 1):
        lines.append(f"{number}. {step['describe']}: `{json.dumps(step['settings'], ensure_ascii=False)}`")
    lines += ["", "## Figures", "", f"| figure | {before} | {after} | change |", "|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.before:,.{row.decimals}f} | {row.after:,.{row.decimals}f} | {row.change} |"
        for row in rows(report)
    ]
    lines += ["", *(f"- {note}" for note in [*notes(report), *chain(report)])]
    return "\n".join(lines).rstrip() + "\n"
