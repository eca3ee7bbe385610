"""What a prepared directory was made of: size and time of each input file, so that a changed one is noticed.

In: the sources, opened. Out: ``inputs.json`` beside the set. It stands apart from the manifest, which says the same of
the same text wherever its files lie.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path

from raylm.config.data import DataSection
from raylm.config.run_directory import write_atomically
from raylm.data.sources.segments import Source, open_sources
from raylm.errors import UserError

FILE = "inputs.json"

Stamps = dict[str, list[int | str]]


def stamps_of(sources: Iterable[Source]) -> Stamps:
    """Of each file its size in bytes and its time of change, or what its server gives for it; by path."""
    found: Stamps = {}
    for source in sources:
        for segment in source.segments:
            stamp = platform.python_version() if segment.format == "stdlib" else segment.stamp
            found.setdefault(segment.path, [segment.size, stamp])
    return found


def open_inputs(data: DataSection) -> list[Source]:
    """All sources that the section names, evaluation sets of ``data.decontamination`` included.

    Raises:
        UserError: one does not exist.
    """
    evaluation = data.decontamination.sources if data.decontamination is not None else []
    return [
        *open_sources(data, data.train_sections, "data.train"),
        *open_sources(data, data.validation_sources, "data.validation"),
        *open_sources(data, evaluation, "data.decontamination.sources"),
    ]


def note_inputs(directory: Path, stamps: Stamps) -> None:
    """Write ``inputs.json``."""
    write_atomically(directory / FILE, json.dumps(stamps, indent=2, ensure_ascii=False) + "\n")


def check_unchanged(directory: Path, data: DataSection, run: Path) -> None:
    """Refuse to take ``directory`` for what the ``data`` section names where a file of it has changed since.

    A set whose sources are gone stands for them, as does one of an older raylm, which has noted nothing.

    Args:
        directory: a whole set.
        data: what it was made from.
        run: the run directory, to be named.

    Raises:
        UserError: a file has changed, came or went; names it.
    """
    path = directory / FILE
    if not path.is_file():
        return
    noted: Stamps = json.loads(path.read_text(encoding="utf-8"))
    try:
        found = stamps_of(open_inputs(data))
    except UserError:
        return
    changed = [(name, noted.get(name), found.get(name)) for name in {**noted, **found}]
    changed = [(name, before, now) for name, before, now in changed if before != now]
    if changed:
        name, before, now = changed[0]
        more = f" (and {len(changed) - 1:,} more files)" if len(changed) > 1 else ""
        raise UserError(
            f"data: {name} {_what_happened(before, now)} since {run} was prepared{more}; choose another run.name to "
            f"prepare the data as it is now, or remove {run} first"
        )


def _what_happened(before: list[int | str] | None, now: list[int | str] | None) -> str:
    if before is None or now is None:
        return "has come" if before is None else "is gone"
    sizes = f"{before[0]:,} bytes, now {now[0]:,}" if before[0] != now[0] else "same size, another time"
    return f"has changed ({sizes})"
