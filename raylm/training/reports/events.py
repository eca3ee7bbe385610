"""What happened to a run beside its steps: ``<run>/events.jsonl``, one object a line, in order.

``kind`` is one of :data:`KINDS`, ``step`` the number of optimizer steps made, ``text`` one line for people, ``time``
seconds since 1970. Unlike metrics.jsonl the file is never cut back: what a rollback undid stays in it. One process
writes it: the driver, or a trial that trains inside itself.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from raylm.config.run_directory import parse_object

EVENTS = "events.jsonl"
# resume: went on from a checkpoint. restart: workers started again. anomaly: went back without some batches. takeover:
# a member of a population went on from another's checkpoint.
KINDS = ("resume", "restart", "anomaly", "interrupted", "failure", "takeover")

ALWAYS: dict[str, type] = {"kind": str, "step": int, "text": str}


def append_event(directory: Path, event: dict[str, Any]) -> None:
    """Append ``event`` (kind, step, text; the time is added where it is missing)."""
    # A full disk is reported by what needed the room, not by the note about it.
    with contextlib.suppress(OSError), (directory / EVENTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), **event}, ensure_ascii=False) + "\n")


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of a run; empty where there is no file. A line that a crash cut off, or a damaged one, is left out."""
    try:
        text = (directory / EVENTS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = [event for line in text.splitlines() if (event := parse_object(line)) is not None]
    return [event for event in found if all(isinstance(event.get(name), kind) for name, kind in ALWAYS.items())]
