"""What one client sees of the collections: those of its API key, the common ones, and the prepared one.

A collection belongs to the key that made it; other keys neither see nor change it. One that was made without keys is
common: all keys use and change it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from raylm.config.serving import CollectionQuota
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.errors import (
    CollectionDamaged,
    CollectionError,
    CollectionExists,
    NoSuchCollection,
    QuotaExceeded,
)  # fmt: skip
from raylm.serving.retrieval.library import EMBEDDED_TOGETHER, Library
from raylm.serving.retrieval.records import Facts, Match, StoredDocument, Usage
from raylm.serving.retrieval.store import NAME, StoredCollection

# What the prepared collection is called.
DEFAULT = "default"
# Of a question that is searched for: more than an encoder reads, and little enough to rank all passages by its words.
LONGEST_QUESTION = 8000


@dataclass(frozen=True)
class Entry:
    """A collection in a list.

    Attributes:
        name: of the collection.
        common: every client sees it.
        facts: what it says about itself; None where it is damaged.
        damage: what is wrong with it.
    """

    name: str
    common: bool
    facts: Facts | None
    damage: str = ""


class Shelf:
    """The collections as one client has them.

    Args:
        library: all collections.
        owner: SHA-256 of the client's API key, hexadecimal; None where there are no keys.
    """

    def __init__(self, library: Library, owner: str | None = None) -> None:
        self._library = library
        self._own = library.store if owner is None else library.store.of(owner)

    async def search(self, name: str | None, question: str, count: int) -> list[Match]:
        """The best passages of ``count`` documents; of the prepared collection where none is named.

        Raises:
            NoSuchCollection: there is none of that name, or no prepared one.
            CollectionError: it is damaged, or the question too long.
            EngineFailure: the encoder has stopped.
        """
        if len(question) > LONGEST_QUESTION:
            raise CollectionError(f"question: found {len(question)} characters, allowed: at most {LONGEST_QUESTION}")
        library = self._library
        collection = await library.in_thread(lambda: self._find(DEFAULT if name is None else name))
        index = await library.in_thread(collection.index)
        if index is None:
            return []
        vector = None
        if library.encoder is not None and index.vectors is not None:
            (vector,) = await library.encoder.vectors([question])

        def rank() -> list[Match]:
            return collection.matches(index.search(question, count, vector, library.dense_weight))

        return await library.in_thread(rank)

    async def entries(self) -> list[Entry]:
        """All collections, the prepared one first, then the client's and the common ones by name."""

        def gather() -> list[Entry]:
            found = [_entry(self._library.prepared, DEFAULT, common=True)] if self._library.prepared else []
            for name in sorted({*self._own.names(), *self._library.store.names()}):
                # One that is deleted meanwhile is none.
                with contextlib.suppress(NoSuchCollection):
                    found.append(self._look(name))
            return found

        return await self._library.in_thread(gather)

    async def entry(self, name: str) -> Entry:
        """One collection."""
        return await self._library.in_thread(lambda: self._look(name))

    async def create(self, name: str) -> Entry:
        """Make an empty collection.

        Raises:
            CollectionExists: the name is taken.
            CollectionError: the name is no name.
            QuotaExceeded: the key has as many as it may have.
        """
        if not NAME.fullmatch(name):
            raise CollectionError(f"name: found '{name}', allowed: a to z, 0 to 9, - and _, at most 64")
        if name == DEFAULT:
            raise CollectionExists(f"The collection '{DEFAULT}' is that of serving.collection; choose another name")

        def make() -> Entry:
            names, most = self._own.names(), self._library.quota.collections
            if name in names or name in self._library.store.names():
                raise CollectionExists(f"The collection '{name}' exists already")
            if len(names) >= most:
                raise QuotaExceeded(f"There are {len(names)} collections, allowed: {most}; delete one first")
            self._own.create(name)
            return self._look(name)

        changes = self._library.changes
        return await changes.carry_out(self._own.root, lambda: changes.in_thread(make))

    async def delete(self, name: str) -> None:
        """Remove a collection, damaged or not."""
        store = await self._library.in_thread(lambda: self._store_of(name))
        changes = self._library.changes
        await changes.carry_out(store.root, lambda: changes.in_thread(lambda: store.delete(name)))

    async def add(self, name: str, documents: Sequence[StoredDocument]) -> int:
        """Put documents into a collection, all or none; when this returns, they are found.

        Returns:
            How many passages came in.

        Raises:
            QuotaExceeded: the key's collections would hold more than they may.
            NoRoom: the disk is full.
        """
        library = self._library
        store = await library.in_thread(lambda: self._store_of(name))
        changes, encoder = library.changes, library.encoder

        def allow(before: Usage, after: Usage) -> None:
            _check(library.quota, store.usage(besides=name), before, after)

        async def change() -> int:
            texts = await changes.in_thread(lambda: [text for document in documents for text in document.to_embed()])
            if encoder is None:
                return await changes.in_thread(lambda: store.get(name).add(documents, allow=allow))
            parts = [texts[at : at + EMBEDDED_TOGETHER] for at in range(0, len(texts), EMBEDDED_TOGETHER)]
            vectors = [vector for part in parts for vector in await encoder.vectors(part)]
            return await changes.in_thread(lambda: store.get(name).add(documents, vectors, encoder.fingerprint, allow))

        return await changes.carry_out(store.root, change)

    async def remove(self, name: str, document_id: str) -> bool:
        """Take a document out of a collection; False where it has none of that id."""
        store = await self._library.in_thread(lambda: self._store_of(name))
        changes = self._library.changes
        return await changes.carry_out(
            store.root, lambda: changes.in_thread(lambda: store.get(name).remove(document_id))
        )

    def _look(self, name: str) -> Entry:
        if name == DEFAULT and self._library.prepared is not None:
            return _entry(self._library.prepared, name, common=True)
        store = self._store_of(name)
        return _entry(store.get(name), name, common=store is self._library.store)

    def _find(self, name: str) -> StoredCollection:
        if name == DEFAULT:
            if self._library.prepared is None:
                raise NoSuchCollection("This server has no collection of its own; name one, or set serving.collection")
            return self._library.prepared
        return self._store_of(name).get(name)

    def _store_of(self, name: str) -> CollectionStore:
        """Where a collection is that the client may change: among its own, or among the common ones."""
        if name == DEFAULT and self._library.prepared is not None:
            raise CollectionError(f"The collection '{DEFAULT}' is made by `raylm prepare` and cannot be changed here")
        try:
            self._own.get(name)
        except NoSuchCollection:
            self._library.store.get(name)
            return self._library.store
        return self._own


def _entry(collection: StoredCollection, name: str, *, common: bool) -> Entry:
    try:
        return Entry(name, common, collection.facts())
    except CollectionDamaged as error:
        return Entry(name, common, None, str(error))


def _check(quota: CollectionQuota, others: Usage, before: Usage, after: Usage) -> None:
    """Refuse what makes a key's collections larger than they may be.

    Args:
        quota: what they may hold.
        others: what the key's other collections hold.
        before, after: what this one holds, and would hold.

    Raises:
        QuotaExceeded: it names what is used and what is allowed.
    """
    documents, size = (others.documents + after.documents, others.bytes + after.bytes)
    if (documents <= quota.documents or after.documents <= before.documents) and (
        size <= quota.megabytes * 1e6 or after.bytes <= before.bytes
    ):
        return
    raise QuotaExceeded(
        f"The collections would hold {documents} documents and {size / 1e6:.2f} MB; used are "
        f"{others.documents + before.documents} and {(others.bytes + before.bytes) / 1e6:.2f} MB, allowed: "
        f"{quota.documents} and {quota.megabytes:g} MB"
    )
