"""All collections of a server, for its event loop: one that ``raylm prepare`` made, and those that were uploaded.

What blocks runs in threads, what computes vectors in the encoder's process. Collections are shared with the other
replicas through the disk alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from raylm.serving.engines.base import EngineFailure
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.encoder import Encoder
from raylm.serving.retrieval.index import DENSE_WEIGHT
from raylm.serving.retrieval.store import (
    NAME,
    CollectionError,
    CollectionExists,
    Facts,
    Match,
    NoSuchCollection,
    StoredCollection,
    StoredDocument,
)  # fmt: skip

# What the prepared collection is called.
DEFAULT = "default"
# Passages whose vectors are kept together: what a stopped server computes again.
EMBEDDED_TOGETHER = 64
MOST_COLLECTIONS = 1000

log = logging.getLogger("raylm.serving")


@dataclass
class Library:
    """The collections.

    Attributes:
        store: those that clients make.
        prepared: the one of ``serving.collection``, which clients cannot change.
        encoder: makes vectors; without it words alone decide.
        dense_weight: share of the vectors in the rank.
    """

    store: CollectionStore
    prepared: StoredCollection | None = None
    encoder: Encoder | None = None
    dense_weight: float = DENSE_WEIGHT
    _tending: asyncio.Task[None] | None = None

    async def search(self, name: str | None, question: str, count: int) -> list[Match]:
        """The best passages of ``count`` documents; of the prepared collection where none is named.

        Raises:
            NoSuchCollection: there is none of that name, or no prepared one.
            EngineFailure: the encoder has stopped.
        """
        collection = self._find(DEFAULT if name is None else name)
        index = await asyncio.to_thread(collection.index)
        if index is None:
            return []
        vector = None
        if self.encoder is not None and index.vectors is not None:
            (vector,) = await self.encoder.vectors([question])

        def rank() -> list[Match]:
            return collection.matches(index.search(question, count, vector, self.dense_weight))

        return await asyncio.to_thread(rank)

    async def all_facts(self) -> list[Facts]:
        """All collections, the prepared one first."""

        def gather() -> list[Facts]:
            found = [self.prepared.facts()] if self.prepared is not None else []
            for name in self.store.names():
                # One that is deleted meanwhile is none.
                with contextlib.suppress(NoSuchCollection):
                    found.append(self.store.get(name).facts())
            return found

        return await asyncio.to_thread(gather)

    async def facts(self, name: str) -> Facts:
        """What one collection says about itself."""
        return await asyncio.to_thread(lambda: self._find(name).facts())

    async def create(self, name: str) -> Facts:
        """Make an empty collection.

        Raises:
            CollectionExists: the name is taken.
            CollectionError: the name is no name, or there are too many collections.
        """

        def make() -> Facts:
            if not NAME.fullmatch(name):
                raise CollectionError(f"name: found '{name}', allowed: a to z, 0 to 9, - and _, at most 64")
            if name == DEFAULT:
                raise CollectionExists(f"The collection '{DEFAULT}' is that of serving.collection; choose another name")
            if len(self.store.names()) >= MOST_COLLECTIONS:
                raise CollectionError(f"There are {MOST_COLLECTIONS} collections already; delete one first")
            return self.store.create(name).facts()

        return await asyncio.to_thread(make)

    async def delete(self, name: str) -> None:
        """Remove a collection."""
        await asyncio.to_thread(lambda: (self._own(name), self.store.delete(name)))

    async def add(self, name: str, documents: Sequence[StoredDocument]) -> int:
        """Put documents into a collection; when this returns, they are found.

        Returns:
            How many passages came in.
        """
        collection = await asyncio.to_thread(self._own, name)
        passages = await asyncio.to_thread(collection.add, documents)
        await self._embed(collection)
        await asyncio.to_thread(collection.build)
        return passages

    async def remove(self, name: str, document_id: str) -> bool:
        """Take a document out of a collection; False where it has none of that id."""
        collection = await asyncio.to_thread(self._own, name)
        removed = await asyncio.to_thread(collection.remove, document_id)
        await asyncio.to_thread(collection.build)
        return removed

    def check(self) -> None:
        """Raise :class:`EngineFailure` if the encoder has died."""
        if self.encoder is not None:
            self.encoder.engine.check()

    def tend(self) -> None:
        """Compute vectors that are missing, in the background and once: call from the event loop, as often as you like.

        They are missing after a server was stopped on the way, or was given another encoder. Of several replicas one
        computes them.
        """
        if self.encoder is not None and self._tending is None:
            self._tending = asyncio.get_running_loop().create_task(self._tend())

    async def _tend(self) -> None:
        names = await asyncio.to_thread(self.store.names)
        for name in [*([DEFAULT] if self.prepared is not None else []), *names]:
            try:
                collection = await asyncio.to_thread(self._find, name)
                with collection.turn("embed") as mine:
                    if mine:
                        await self._embed(collection)
                        await asyncio.to_thread(collection.build)
            except (CollectionError, EngineFailure, OSError) as error:
                # The others can still be searched, and this one by its words.
                log.warning("collection %s: vectors were not computed: %s", name, error)

    async def _embed(self, collection: StoredCollection) -> None:
        """Compute the vectors that ``collection`` has not."""
        if self.encoder is None:
            return
        fingerprint = self.encoder.fingerprint
        while rows := await asyncio.to_thread(collection.to_embed, fingerprint, EMBEDDED_TOGETHER):
            vectors = await self.encoder.vectors([text for _, text in rows])
            numbers = [number for number, _ in rows]
            pairs = list(zip(numbers, vectors, strict=True))
            await asyncio.to_thread(collection.keep_vectors, fingerprint, pairs)

    def _find(self, name: str) -> StoredCollection:
        if name == DEFAULT:
            if self.prepared is None:
                raise NoSuchCollection("This server has no collection of its own; name one, or set serving.collection")
            return self.prepared
        return self.store.get(name)

    def _own(self, name: str) -> StoredCollection:
        """A collection that clients may change."""
        if name == DEFAULT and self.prepared is not None:
            raise CollectionError(f"The collection '{DEFAULT}' is made by `raylm prepare` and cannot be changed here")
        return self._find(name)
