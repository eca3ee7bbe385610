"""Which side a row of examples is on, and which rows a model is measured on.

In: the ``data`` section, and how the rows of some sources are read. Out: the rows, with their side or of one side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from raylm.config.data import DataSection, SourceSection
from raylm.data.sources.documents import Split, hash_share
from raylm.errors import UserError

Row = TypeVar("Row")
# From sources and the key that names them to their rows.
Read = Callable[[list[str | SourceSection], str], Iterator[Row]]


def with_sides(data: DataSection, read: Read[Row], held_out_by: Callable[[Row], str]) -> Iterator[tuple[Split, Row]]:
    """All rows with their side.

    Args:
        held_out_by: from a row to the text whose hash decides where there is no ``data.validation``: rows of the same
            text are on one side.
    """
    for key, names, sole in _sources(data):
        for row in read(names, key):
            held_out = hash_share(held_out_by(row), b"raylm-split") < data.validation_fraction
            yield sole or ("validation" if held_out else "train"), row


def _sources(data: DataSection) -> Iterator[tuple[str, list[str | SourceSection], Split | None]]:
    """Keys, sources, and the one side that they give to."""
    yield "data.train", list(data.train_sections), "train" if data.validation_sources else None
    yield "data.validation", list(data.validation_sources), "validation"


def measured_on(data: DataSection, split: Split, read: Read[Row], what: str) -> list[Row]:
    """The rows of ``data.validation`` where it is given and ``split`` asks for it, else all of ``data.train``.

    Args:
        what: a row is, for the message.

    Raises:
        UserError: there is none.
    """
    use_validation = split == "validation" and bool(data.validation_sources)
    key = "data.validation" if use_validation else "data.train"
    names = data.validation_sources if use_validation else data.train_sections
    found = list(read(list(names), key))
    if not found:
        raise UserError(f"{key}: found no {what}")
    return found
