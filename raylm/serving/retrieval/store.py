"""Collections on disk: documents, passages and vectors in SQLite, and beside them the index that is searched.

``<root>/<name>/documents.sqlite`` is what is known; ``index-<version>-<id>/`` is made of it, and ``CURRENT``, replaced
whole, names the newest one. Any number of processes read and write one collection: writers take turns under a lock
file, and readers look at ``CURRENT`` before each search. Documents come in with their index or not at all: a client
that leaves, a full disk and a process killed half-way leave the last whole state.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from raylm.config.run_directory import write_atomically
from raylm.serving.retrieval.database import (
    count_change,
    create_database,
    insert,
    keep_fact,
    known,
    passages_in,
    take_out,
    to_blob,
    transaction,
)  # fmt: skip
from raylm.serving.retrieval.errors import CollectionError, CollectionExists, damaged, told
from raylm.serving.retrieval.index import Hit, Index, write_index
from raylm.serving.retrieval.records import Facts, Match, Passage, PassageRow, StoredDocument, Usage, embedded_text

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Every change reads all passages once: a collection beyond this wants a search engine of its own.
MOST_PASSAGES = 500_000


class StoredCollection:
    """One collection of the disk; methods block and may be called from any thread.

    All raise :class:`~raylm.serving.retrieval.errors.CollectionError`, which says what is wrong with it.

    Args:
        path: its directory.
        write: makes an index of passages in a new directory.
    """

    def __init__(self, path: Path, write: Callable[[Iterable[PassageRow], Path], None] = write_index) -> None:
        self.path = path
        self._write = write
        self._loaded: tuple[str, Index | None] | None = None

    @classmethod
    def create(cls, path: Path) -> StoredCollection:
        """Make an empty collection.

        Raises:
            CollectionExists: there is one already.
            NoRoom: the disk is full.
        """
        making = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            with told(making, path.name):
                making.mkdir(parents=True)
                create_database(making / "documents.sqlite")
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
        with told(self.path):
            self.path.rename(leaving)
        self._loaded = None
        shutil.rmtree(leaving, ignore_errors=True)

    def facts(self) -> Facts:
        """Counts and version."""
        self._current()
        with self._database() as database:
            whole = known(database)
            documents = database.execute("SELECT count(*) FROM documents").fetchone()[0]
            passages, embedded = database.execute("SELECT count(*), count(vector) FROM passages").fetchone()
        return Facts(self.path.name, whole.created, whole.version, documents, passages, embedded, whole.bytes)

    def usage(self) -> Usage:
        """What it counts in a quota; the file itself where it is damaged."""
        try:
            with self._database() as database:
                return _usage(database)
        except CollectionError:
            file = self.path / "documents.sqlite"
            return Usage(0, file.stat().st_size if file.is_file() else 0)

    def fact(self, key: str) -> str:
        """One of the strings that were kept by :meth:`keep_fact`; empty without it."""
        with self._database() as database:
            row = database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return row[0] if row else ""

    def keep_fact(self, key: str, value: str) -> None:
        """Keep a string under a name of its own."""
        with self._database(changes=True) as database:
            keep_fact(database, key, value)

    def add(
        self,
        documents: Iterable[StoredDocument],
        vectors: Sequence[np.ndarray] | None = None,
        encoder: str = "",
        allow: Callable[[Usage, Usage], None] | None = None,
    ) -> int:
        """Put documents in, in place of those with the same ids, and index them; all of them, or none.

        Args:
            documents: with any ids.
            vectors: of their passages, in order, fp32 of length 1.
            encoder: whose vectors those are; the vectors of another one are forgotten.
            allow: is given what the collection holds and would hold, and raises where it may not.

        Returns:
            How many passages came in.

        Raises:
            CollectionError: it would become too large, or the disk is full; nothing was changed.
        """
        added, rest = 0, list(vectors) if vectors is not None else None
        with self._change() as database:
            before = _usage(database)
            size = before.bytes
            if rest is not None:
                _take_encoder(database, encoder)
            for document in documents:
                mine = None
                if rest is not None:
                    mine, rest = rest[: len(document.spans)], rest[len(document.spans) :]
                size += document.bytes - (take_out(database, document.id) or 0)
                insert(database, document, mine)
                added += len(document.spans)
            count_change(database, size)
            (passages,) = database.execute("SELECT count(*) FROM passages").fetchone()
            if passages > MOST_PASSAGES:
                raise CollectionError(
                    f"The collection '{self.path.name}' would have {passages} passages, allowed: {MOST_PASSAGES}"
                )
            if allow is not None:
                allow(before, _usage(database))
        return added

    def remove(self, document_id: str) -> bool:
        """Take a document out, of the index as well. False where there is none of that id."""
        with contextlib.suppress(_NothingChangedError), self._change() as database:
            size = known(database).bytes
            gone = take_out(database, document_id)
            if gone is None:
                raise _NothingChangedError
            count_change(database, size - gone)
            return True
        return False

    def clear(self) -> None:
        """Take all documents out; they are found until :meth:`add` or :meth:`build`."""
        with self._database(changes=True) as database:
            database.execute("DELETE FROM passages")
            database.execute("DELETE FROM documents")
            count_change(database, 0)

    def to_embed(self, encoder: str, count: int) -> list[tuple[int, str]]:
        """(number, text) of up to ``count`` passages without a vector; those of another encoder are forgotten."""
        with self._database(changes=True) as database:
            _take_encoder(database, encoder)
            rows = passages_in(database, "vector IS NULL", count)
            return [(number, embedded_text(title, text)) for number, _, title, _, text, _ in rows]

    def keep_vectors(self, encoder: str, vectors: Sequence[tuple[int, np.ndarray]]) -> None:
        """Keep vectors of passages, fp32 of length 1; passages that have gone meanwhile are left out."""
        rows = [(to_blob(vector), number) for number, vector in vectors]
        with self._database(changes=True) as database:
            if known(database).encoder == encoder:
                database.executemany("UPDATE passages SET vector = ? WHERE number = ?", rows)
                count_change(database)

    def is_whole(self, encoder: str | None) -> bool:
        """Whether the index is that of the documents, and has their vectors by ``encoder``, if there is one."""
        current = self._current()
        with self._database() as database:
            whole = known(database)
            if not current:
                return database.execute("SELECT 1 FROM passages LIMIT 1").fetchone() is None
        if not current.startswith(f"index-{whole.version}-"):
            return False
        return encoder is None or (whole.encoder == encoder and (self.path / current / "vectors.npy").is_file())

    def build(self) -> None:
        """Make the index of what is in now, unless there is one already, and let every reader take it."""
        with self.locked("build"), self._database() as database:
            if not self._current().startswith(f"index-{known(database).version}-"):
                self._index(database)

    def index(self) -> Index | None:
        """The newest index; None while there are no passages."""
        for _ in range(5):
            current = self._current()
            loaded = self._loaded
            if loaded is not None and loaded[0] == current:
                return loaded[1]
            with told(self.path):
                try:
                    index = Index.load(self.path / current) if current else None
                except FileNotFoundError:
                    # Replaced twice since its name was read.
                    continue
                except (ValueError, KeyError, TypeError, EOFError) as error:
                    raise damaged(self.path.name, error) from None
            self._loaded = (current, index)
            return index
        raise damaged(self.path.name, f"{current} is missing")

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
        with told(self.path):
            stream = (self.path / f".{what}.lock").open("a")
        with stream:
            yield stream

    def _current(self) -> str:
        try:
            with told(self.path):
                return (self.path / "CURRENT").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path.name, error) from None

    @contextlib.contextmanager
    def _database(self, *, changes: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction, as :func:`transaction` makes it."""
        with told(self.path), transaction(self.path / "documents.sqlite", changes=changes) as database:
            yield database

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction whose changes come with a new index: both are there at the end of the block, or neither."""
        with self.locked("build"), self._database(changes=True) as database:
            yield database
            self._index(database)

    def _index(self, database: sqlite3.Connection) -> None:
        """Make the index of what ``database`` holds, commit, and let every reader take it."""
        previous, version = self._current(), known(database).version
        # No two indexes share a name, not even those of a deleted collection and one called the same.
        name = f"index-{version}-{uuid.uuid4().hex[:8]}"
        making, naming = self.path / f".{name}", self.path / ".CURRENT.next"
        try:
            if database.execute("SELECT 1 FROM passages LIMIT 1").fetchone() is None:
                name = ""
            else:
                self._write(passages_in(database), making)
                making.rename(self.path / name)
            # Nothing is written after the commit, only named: a disk may be full by then.
            with naming.open("w", encoding="utf-8") as stream:
                stream.write(name)
                stream.flush()
                os.fsync(stream.fileno())
            database.commit()
        except BaseException:
            for left in (making, self.path / (name or making.name)):
                shutil.rmtree(left, ignore_errors=True)
            naming.unlink(missing_ok=True)
            raise
        naming.replace(self.path / "CURRENT")
        # Who has just read the last name may be opening it.
        for old in (*self.path.glob("index-*"), *self.path.glob(".index-*")):
            if old.name not in (name, previous):
                shutil.rmtree(old, ignore_errors=True)


def _usage(database: sqlite3.Connection) -> Usage:
    (documents,) = database.execute("SELECT count(*) FROM documents").fetchone()
    return Usage(documents, known(database).bytes)


class _NothingChangedError(Exception):
    """Leaves a change that changes nothing."""


def _take_encoder(database: sqlite3.Connection, encoder: str) -> None:
    """Forget the vectors of another encoder: they cannot be compared."""
    if known(database).encoder != encoder:
        database.execute("UPDATE passages SET vector = NULL")
        keep_fact(database, "encoder", encoder)
        count_change(database)
