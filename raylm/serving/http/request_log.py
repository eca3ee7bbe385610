"""One line of JSON for each request: its id, whose key, what was asked for, how it ended and how long it took.

Neither texts nor keys are ever in it. Routes add what they know to the entry of the request that they work for.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

FILE_BYTES, OLD_FILES = 50_000_000, 3
_entry: ContextVar[dict[str, Any] | None] = ContextVar("raylm_request_entry", default=None)
_log = logging.getLogger("raylm.requests")


def begin(entry: dict[str, Any]) -> None:
    """Make ``entry`` that of the request in work here and in the tasks it starts."""
    _entry.set(entry)


def note(**values: Any) -> None:
    """Put ``values`` into the entry of the request in work, if there is one."""
    entry = _entry.get()
    if entry is not None:
        entry.update(values)


def count(**values: int) -> None:
    """Add ``values`` to what the entry of the request in work has under these names."""
    entry = _entry.get()
    if entry is not None:
        for name, value in values.items():
            entry[name] = entry.get(name, 0) + value


def write(entry: dict[str, Any]) -> None:
    """Write the line of a request that is over."""
    _log.info("%s", json.dumps(entry, ensure_ascii=False))


def write_to(path: Path) -> None:
    """Send the lines of this process to ``path``; a file of 50 MB is put aside, and three old ones are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.setLevel(logging.INFO)
    _log.propagate = False
    _log.addHandler(handler)
