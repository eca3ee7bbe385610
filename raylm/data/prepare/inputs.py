"""What a prepared directory or a run was made of: size and time of each input file, so that a changed one is noticed.

In: the sources, opened, and a model. Out: ``inputs.json`` beside the result. It stands apart from the manifest, which
says the same of the same text wherever its files lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raylm.config.data import DataSection
from raylm.config.run_directory import write_atomically
from raylm.data.loading import resolve_model
from raylm.data.sources.segments import MANIFEST, Source, open_sources
from raylm.errors import UserError

FILE = "inputs.json"
# Before the files of an existing tokenizer.
TOKENIZER = "tokenizer: "
# Of a model's directory.
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")

Stamps = dict[str, list[int | str]]


def stamps_of(sources: Iterable[Source]) -> Stamps:
    """Of each file its size in bytes and its time of change, or what its server gives for it; by path."""
    found: Stamps = {}
    for source in sources:
        for segment in source.segments:
            stamp = platform.python_version() if segment.format == "stdlib" else segment.stamp
            found.setdefault(segment.path, [segment.size, stamp])
    return found


def run_stamps(data: DataSection, model: str | Path | None = None) -> Stamps:
    """:func:`stamps_of` all that a run reads: its sources, of a prepared set the manifest, and a model of this machine.

    What is gone, or is no file of this machine, is left out.
    """
    found: Stamps = {}
    for sources, key in _named(data):
        with contextlib.suppress(UserError):
            found |= stamps_of(open_sources(data, sources, key))
    for name in data.train_sources:
        directory = Path(name).expanduser()
        if (manifest := directory / MANIFEST).is_file():
            # It is the same wherever a copy of the set lies, and whenever it was made.
            content = manifest.read_bytes()
            found = {path: stamp for path, stamp in found.items() if not Path(path).is_relative_to(directory)}
            found[str(manifest)] = [len(content), hashlib.sha256(content).hexdigest()]
    return found | (model_stamps(model) if model is not None else {})


def model_stamps(model: str | Path) -> Stamps:
    """Of the files of a model or tokenizer on this machine."""
    directory = Path(model).expanduser()
    if not (directory / "tokenizer.json").is_file():
        try:
            directory = Path(resolve_model(model))
        except UserError:
            return {}
    files = [path for path in sorted(directory.glob("*")) if path.suffix in MODEL_FILES]
    return {str(path): [path.stat().st_size, str(path.stat().st_mtime_ns)] for path in files}


def tokenizer_stamps(tokenizer: str | Path | None) -> Stamps:
    """:func:`model_stamps` of an existing tokenizer that a set is made with, told apart from the sources."""
    found = {} if tokenizer is None else model_stamps(tokenizer)
    return {f"{TOKENIZER}{name}": stamp for name, stamp in found.items()}


def open_inputs(data: DataSection) -> list[Source]:
    """All sources that the section names, evaluation sets of ``data.decontamination`` included.

    Raises:
        UserError: one does not exist.
    """
    return [source for sources, key in _named(data) for source in open_sources(data, sources, key)]


def _named(data: DataSection) -> list[tuple[list[Any], str]]:
    """The sources of each key that names some."""
    evaluation = data.decontamination.sources if data.decontamination is not None else []
    return [
        (data.train_sections, "data.train"),
        (data.validation_sources, "data.validation"),
        (evaluation, "data.decontamination.sources"),
    ]


def note_inputs(directory: Path, stamps: Stamps) -> None:
    """Write ``inputs.json``."""
    write_atomically(directory / FILE, json.dumps(stamps, indent=2, ensure_ascii=False) + "\n")


def check_unchanged(directory: Path, data: DataSection, run: Path, tokenizer: str | Path | None = None) -> None:
    """Refuse to take ``directory`` for what the ``data`` section names where a file of it has changed since.

    A set whose sources are gone stands for them, as does one of an older raylm, which has noted nothing.

    Args:
        directory: a whole set.
        data: what it was made from.
        run: the run directory, to be named.
        tokenizer: an existing one that it was made with.

    Raises:
        UserError: a file has changed, came or went; names it.
    """
    try:
        found = stamps_of(open_inputs(data))
    except UserError:
        return
    _compare(directory, found | tokenizer_stamps(tokenizer), run)


def check_run_unchanged(run: Path, data: DataSection, model: str | Path | None) -> None:
    """Refuse to take a finished run for one of the data and the model as they are now where a file has changed since.

    What is gone counts as it was, as does all of a run of an older raylm, which has noted nothing.

    Raises:
        UserError: a file has changed or came; names it.
    """
    _compare(run, run_stamps(data, model), run, gone=False)


def _compare(directory: Path, found: Stamps, run: Path, *, gone: bool = True) -> None:
    """Refuse what differs from what ``directory`` has noted; with ``gone`` also sources that are no longer there.

    A tokenizer that is gone stands for itself, and so does one of a set that has noted none.
    """
    path = directory / FILE
    if not path.is_file():
        return
    noted: Stamps = json.loads(path.read_text(encoding="utf-8"))
    notes_tokenizer = any(name.startswith(TOKENIZER) for name in noted)
    names = [name for name in ({**noted, **found} if gone else found) if not name.startswith(TOKENIZER)]
    if notes_tokenizer:
        names += [name for name in found if name.startswith(TOKENIZER)]
    changed = [(name, noted.get(name), found.get(name)) for name in names]
    changed = [(name, before, now) for name, before, now in changed if before != now]
    if changed:
        name, before, now = changed[0]
        more = f" (and {len(changed) - 1:,} more files)" if len(changed) > 1 else ""
        key = "data: " if gone and not name.startswith(TOKENIZER) else ""
        raise UserError(
            f"{key}{name} {_what_happened(before, now)} since {run} was made{more}; choose another run.name to take it "
            f"as it is now, or remove {run} first"
        )


def _what_happened(before: list[int | str] | None, now: list[int | str] | None) -> str:
    if before is None or now is None:
        return "has come" if before is None else "is gone"
    sizes = f"{before[0]:,} bytes, now {now[0]:,}" if before[0] != now[0] else "same size, another time"
    return f"has changed ({sizes})"
