"""The SQLite database of a collection: documents, passages with their vectors, and facts."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from raylm.serving.retrieval.records import PassageRow, StoredDocument

LOCK_SECONDS = 60.0

_SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE documents (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, title TEXT NOT NULL,
    aliases TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE passages (number INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL, start INTEGER NOT NULL,
    stop INTEGER NOT NULL, vector BLOB);
CREATE INDEX passages_of ON passages (document);
"""
# Of documents in UTF-8: length() of a text counts characters, and those before the first NUL only.
_BYTES = "coalesce(sum(length(CAST(title AS BLOB)) + length(CAST(text AS BLOB))), 0)"


def create_database(path: Path) -> None:
    """Make an empty one."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.executescript(_SCHEMA)
        facts = {"version": "0", "created": str(int(time.time())), "encoder": "", "bytes": "0"}
        database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())


@contextlib.contextmanager
def transaction(path: Path, *, changes: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection whose changes are kept together at the end of the block, or not at all.

    Args:
        path: of the database, which must be there.
        changes: take the right to change at once. Readers go on meanwhile: pages stay in memory until the end.

    Raises:
        sqlite3.Error: as it comes.
    """
    with contextlib.closing(
        sqlite3.connect(f"file:{quote(str(path))}?mode=rw", timeout=LOCK_SECONDS, isolation_level=None, uri=True)
    ) as database:
        if changes:
            database.execute("PRAGMA cache_spill = OFF")
        database.execute("BEGIN IMMEDIATE" if changes else "BEGIN")
        try:
            yield database
        except BaseException:
            if database.in_transaction:
                database.rollback()
            raise
        if database.in_transaction:
            database.commit()


@dataclass(frozen=True)
class Known:
    """What is kept about the whole: when it was made, how often it changed, bytes of documents, whose vectors."""

    created: int
    version: int
    bytes: int
    encoder: str


def known(database: sqlite3.Connection) -> Known:
    """What is kept; the bytes, which an earlier raylm did not keep, are counted where they are missing.

    Raises:
        sqlite3.DatabaseError: something is missing.
    """
    facts = dict(database.execute("SELECT key, value FROM facts"))
    if "bytes" not in facts:
        (facts["bytes"],) = database.execute(f"SELECT {_BYTES} FROM documents").fetchone()
    try:
        numbers = (int(facts[key]) for key in ("created", "version", "bytes"))
        return Known(*numbers, encoder=facts["encoder"])
    except (KeyError, ValueError):
        raise sqlite3.DatabaseError("facts are missing") from None


def keep_fact(database: sqlite3.Connection, key: str, value: object) -> None:
    """Keep a string under a name of its own."""
    database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, str(value)))


def count_change(database: sqlite3.Connection, size: int | None = None) -> None:
    """Note that something is another than before, and the bytes of all documents where those have changed."""
    database.execute("UPDATE facts SET value = CAST(value AS INTEGER) + 1 WHERE key = 'version'")
    if size is not None:
        keep_fact(database, "bytes", size)


def insert(database: sqlite3.Connection, document: StoredDocument, vectors: list[np.ndarray] | None) -> None:
    """Put a document in; ``vectors`` are those of its passages, in order."""
    number = database.execute(
        "INSERT INTO documents (id, title, aliases, text) VALUES (?, ?, ?, ?)",
        (document.id, document.title, document.aliases, document.text),
    ).lastrowid
    blobs = [None] * len(document.spans) if vectors is None else [to_blob(vector) for vector in vectors]
    rows = [(number, *span, blob) for span, blob in zip(document.spans, blobs, strict=True)]
    database.executemany("INSERT INTO passages (document, start, stop, vector) VALUES (?, ?, ?, ?)", rows)


def take_out(database: sqlite3.Connection, document_id: str) -> int | None:
    """Take a document out: how many bytes it had; None where there is none of that id."""
    row = database.execute(f"SELECT number, {_BYTES} FROM documents WHERE id = ?", (document_id,)).fetchone()
    if row[0] is None:
        return None
    database.execute("DELETE FROM passages WHERE document = ?", row[:1])
    database.execute("DELETE FROM documents WHERE number = ?", row[:1])
    return row[1]


def passages_in(database: sqlite3.Connection, where: str = "TRUE", most: int = -1) -> Iterator[PassageRow]:
    """Passages in order, all or ``most``.

    A document's text is read once for all of its passages, which follow each other.
    """
    rows = database.execute(
        f"SELECT number, document, start, stop, vector FROM passages WHERE {where} ORDER BY number LIMIT {most}"
    )
    last, title, aliases, text = None, "", "", ""
    for number, document, start, stop, vector in rows:
        if document != last:
            found = database.execute("SELECT title, aliases, text FROM documents WHERE number = ?", (document,))
            if (row := found.fetchone()) is None:
                raise sqlite3.DatabaseError("a passage has no document")
            (title, aliases, text), last = row, document
        yield number, document, title, aliases, text[start:stop], vector


def to_blob(vector: np.ndarray) -> bytes:
    """A vector as it is kept, fp32."""
    return vector.astype("<f4").tobytes()
