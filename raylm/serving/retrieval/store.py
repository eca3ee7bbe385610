"""Collections on disk: documents, passages and vectors in SQLite, and beside them the index that is searched.

``<root>/<name>/documents.sqlite`` is what is known; ``index-<version>-<id>/`` is made of it, and ``CURRENT``, replaced
whole, names the newest one. Any number of processes read and write one collection: writers take turns under a lock
file, and readers look at ``CURRENT`` before each search. A process killed half-way leaves the last whole state.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raylm.config.run_directory import write_atomically
from raylm.data.samples.passages import passage_spans
from raylm.serving.retrieval.index import Hit, Index

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Every change reads all passages once: a collection beyond this wants a search engine of its own.
MOST_PASSAGES = 500_000
LOCK_SECONDS = 60.0

_SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE documents (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, title TEXT NOT NULL,
    aliases TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE passages (number INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL, start INTEGER NOT NULL,
    stop INTEGER NOT NULL, vector BLOB);
CREATE INDEX passages_of ON passages (document);
"""


class CollectionError(Exception):
    """A collection cannot do what is asked; the text says why."""


class NoSuchCollection(CollectionError):
    """There is no collection of that name (any more)."""


class CollectionExists(CollectionError):
    """The name is taken."""


@dataclass(frozen=True)
class StoredDocument:
    """A document as it is put into a collection; ``aliases`` are other names, with spaces between."""

    id: str
    title: str
    text: str
    aliases: str = ""


@dataclass(frozen=True)
class Passage:
    """A piece of a document: ``document text[start:end]``, with the document's id, title and other names."""

    id: str
    title: str
    text: str
    aliases: str = ""
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Match:
    """A passage that was found: how well it fits (higher is better), and its relevance from 0 to 1."""

    passage: Passage
    score: float
    relevance: float


@dataclass(frozen=True)
class Facts:
    """What a collection says about itself; ``embedded`` counts passages with a vector."""

    name: str
    created: int
    version: int
    documents: int
    passages: int
    embedded: int


class StoredCollection:
    """One collection of the disk; methods block and may be called from any thread.

    Args:
        path: its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded: tuple[str, Index | None] | None = None

    @classmethod
    def create(cls, path: Path) -> StoredCollection:
        """Make an empty collection.

        Raises:
            CollectionExists: there is one already.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        making = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        making.mkdir()
        try:
            with contextlib.closing(sqlite3.connect(making / "documents.sqlite")) as database, database:
                database.executescript(_SCHEMA)
                facts = {"version": "0", "created": str(int(time.time())), "encoder": ""}
                database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            write_atomically(making / "CURRENT", "")
            try:
                making.rename(path)
            except OSError:
                raise CollectionExists(f"The collection '{path.name}' exists already") from None
        finally:
            shutil.rmtree(making, ignore_errors=True)
        return cls(path)

    def delete(self) -> None:
        """Remove it; searches that have begun still end."""
        leaving = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex}")
        try:
            self.path.rename(leaving)
        except FileNotFoundError:
            raise NoSuchCollection(f"The collection '{self.path.name}' does not exist") from None
        shutil.rmtree(leaving, ignore_errors=True)

    def facts(self) -> Facts:
        """Counts and version."""
        with self._database() as database:
            known = dict(database.execute("SELECT key, value FROM facts"))
            documents = database.execute("SELECT count(*) FROM documents").fetchone()[0]
            passages, embedded = database.execute("SELECT count(*), count(vector) FROM passages").fetchone()
        return Facts(self.path.name, int(known["created"]), int(known["version"]), documents, passages, embedded)

    def fact(self, key: str) -> str:
        """One of the strings that were kept by :meth:`keep_fact`; empty without it."""
        with self._database() as database:
            row = database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return row[0] if row else ""

    def keep_fact(self, key: str, value: str) -> None:
        """Keep a string under a name of its own."""
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def add(self, documents: Iterable[StoredDocument]) -> int:
        """Put documents in, in place of those with the same ids; they are found after :meth:`build`.

        Returns:
            How many passages came in.

        Raises:
            CollectionError: it would become too large; nothing was changed.
        """
        added = 0
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            for document in documents:
                _remove(database, document.id)
                number = database.execute(
                    "INSERT INTO documents (id, title, aliases, text) VALUES (?, ?, ?, ?)",
                    (document.id, document.title, document.aliases, document.text),
                ).lastrowid
                spans = [(number, *span) for span in passage_spans(document.text)]
                database.executemany("INSERT INTO passages (document, start, stop) VALUES (?, ?, ?)", spans)
                added += len(spans)
            (passages,) = database.execute("SELECT count(*) FROM passages").fetchone()
            if passages > MOST_PASSAGES:
                raise CollectionError(
                    f"The collection '{self.path.name}' would have {passages} passages, allowed: {MOST_PASSAGES}"
                )
            _count_change(database)
        return added

    def remove(self, document_id: str) -> bool:
        """Take a document out; it is found until :meth:`build`. False where there is none of that id."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            removed = _remove(database, document_id)
            if removed:
                _count_change(database)
        return removed

    def clear(self) -> None:
        """Take all documents out."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM passages")
            database.execute("DELETE FROM documents")
            _count_change(database)

    def to_embed(self, encoder: str, count: int) -> list[tuple[int, str]]:
        """(number, text) of up to ``count`` passages without a vector; those of another encoder are forgotten."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            (known,) = database.execute("SELECT value FROM facts WHERE key = 'encoder'").fetchone()
            if known != encoder:
                database.execute("UPDATE passages SET vector = NULL")
                database.execute("UPDATE facts SET value = ? WHERE key = 'encoder'", (encoder,))
                _count_change(database)
            rows = database.execute(
                "SELECT passages.number, title, text, start, stop FROM passages JOIN documents "
                "ON documents.number = document WHERE vector IS NULL ORDER BY passages.number LIMIT ?",
                (count,),
            ).fetchall()
        return [
            (number, "\n".join(filter(None, [title, text[start:stop]]))) for number, title, text, start, stop in rows
        ]

    def keep_vectors(self, encoder: str, vectors: Sequence[tuple[int, np.ndarray]]) -> None:
        """Keep vectors of passages, fp32 of length 1; passages that have gone meanwhile are left out."""
        rows = [(vector.astype("<f4").tobytes(), number) for number, vector in vectors]
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            if database.execute("SELECT value FROM facts WHERE key = 'encoder'").fetchone()[0] == encoder:
                database.executemany("UPDATE passages SET vector = ? WHERE number = ?", rows)
                _count_change(database)

    def build(self) -> None:
        """Make the index of what is in now, unless there is one already, and let every reader take it."""
        with self.locked("build"):
            with self._database() as database:
                database.execute("BEGIN")
                (version,) = database.execute("SELECT value FROM facts WHERE key = 'version'").fetchone()
                previous = self._current()
                if previous.startswith(f"index-{version}-"):
                    return
                # No two indexes share a name, not even those of a deleted collection and one called the same.
                name = f"index-{version}-{uuid.uuid4().hex[:8]}"
                rows = database.execute(
                    "SELECT passages.number, document, title, aliases, text, start, stop, vector "
                    "FROM passages JOIN documents ON documents.number = document ORDER BY passages.number"
                ).fetchall()
            if not rows:
                write_atomically(self.path / "CURRENT", "")
                return
            embedded = all(row[-1] is not None for row in rows)
            vectors = np.stack([np.frombuffer(row[-1], "<f4") for row in rows]) if embedded else None
            making = self.path / f".{name}"
            Index.build(((*row[:4], row[4][row[5] : row[6]]) for row in rows), vectors).save(making)
            making.rename(self.path / name)
            write_atomically(self.path / "CURRENT", name)
            # Who has just read the last name may be opening it.
            for old in (*self.path.glob("index-*"), *self.path.glob(".index-*")):
                if old.name not in (name, previous):
                    shutil.rmtree(old, ignore_errors=True)

    def index(self) -> Index | None:
        """The newest index; None while there are no passages."""
        for _ in range(5):
            current = self._current()
            loaded = self._loaded
            if loaded is not None and loaded[0] == current:
                return loaded[1]
            try:
                index = Index.load(self.path / current) if current else None
            except FileNotFoundError:
                # Replaced twice since its name was read.
                continue
            self._loaded = (current, index)
            return index
        raise CollectionError(f"The collection '{self.path.name}' is damaged: {current} is missing")

    def search(self, question: str, count: int, vector: np.ndarray | None = None, **how: float) -> list[Match]:
        """The best passages of the ``count`` best documents, as :meth:`Index.search` ranks them."""
        index = self.index()
        return self.matches(index.search(question, count, vector, **how)) if index is not None else []

    def matches(self, hits: Sequence[Hit]) -> list[Match]:
        """The passages of ``hits``; those whose document has gone meanwhile are left out."""
        found = []
        with self._database() as database:
            for hit in hits:
                row = database.execute(
                    "SELECT id, title, text, aliases, start, stop FROM passages JOIN documents "
                    "ON documents.number = document WHERE passages.number = ?",
                    (hit.passage,),
                ).fetchone()
                if row is not None:
                    id_, title, text, aliases, start, stop = row
                    passage = Passage(id_, title, text[start:stop], aliases, start, stop)
                    found.append(Match(passage, hit.score, hit.relevance))
        return found

    @contextlib.contextmanager
    def turn(self, what: str) -> Iterator[bool]:
        """Whether this process may do ``what``, which one does for all; says at once."""
        with self._open_lock(what) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Wait until no other process does ``what``."""
        with self._open_lock(what) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _open_lock(self, what: str) -> Iterator[object]:
        try:
            stream = (self.path / f".{what}.lock").open("a")
        except FileNotFoundError:
            raise NoSuchCollection(f"The collection '{self.path.name}' does not exist") from None
        with stream:
            yield stream

    def _current(self) -> str:
        try:
            return (self.path / "CURRENT").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise NoSuchCollection(f"The collection '{self.path.name}' does not exist") from None

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are kept together at the end of the block, or not at all."""
        self._current()
        try:
            with contextlib.closing(
                sqlite3.connect(self.path / "documents.sqlite", timeout=LOCK_SECONDS, isolation_level=None)
            ) as database:
                try:
                    yield database
                except BaseException:
                    if database.in_transaction:
                        database.rollback()
                    raise
                if database.in_transaction:
                    database.commit()
        except sqlite3.Error as error:
            self._current()
            raise CollectionError(f"The collection '{self.path.name}' cannot be used: {error}") from None


def _remove(database: sqlite3.Connection, document_id: str) -> bool:
    row = database.execute("SELECT number FROM documents WHERE id = ?", (document_id,)).fetchone()
    if row is None:
        return False
    database.execute("DELETE FROM passages WHERE document = ?", row)
    database.execute("DELETE FROM documents WHERE number = ?", row)
    return True


def _count_change(database: sqlite3.Connection) -> None:
    database.execute("UPDATE facts SET value = CAST(value AS INTEGER) + 1 WHERE key = 'version'")
