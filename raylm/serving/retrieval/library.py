"""All collections of a server, for its event loop: one that ``raylm prepare`` made, and those that were uploaded.

What blocks runs in threads, what computes vectors in the encoder's process. Collections are shared with the other
replicas through the disk alone. What one client sees of them is a :class:`~raylm.serving.retrieval.shelf.Shelf`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from raylm.config.serving import CollectionQuota
from raylm.serving.engines.base import EngineFailure
from raylm.serving.retrieval.changes import Changes
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.encoder import Encoder
from raylm.serving.retrieval.errors import CollectionError, NoSuchCollection
from raylm.serving.retrieval.index import DENSE_WEIGHT
from raylm.serving.retrieval.store import StoredCollection

# Passages whose vectors are kept together: what a stopped server computes again.
EMBEDDED_TOGETHER = 64
# Threads that only read; changes have others.
READING_THREADS = 8
# Between two looks for collections that are not whole.
TEND_SECONDS = 60.0

T = TypeVar("T")
log = logging.getLogger("raylm.serving")


def _reading_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READING_THREADS, thread_name_prefix="collection-read")


@dataclass
class Library:
    """The collections.

    Attributes:
        store: those that clients make.
        prepared: the one of ``serving.collection``, which clients cannot change.
        encoder: makes vectors; without it words alone decide.
        dense_weight: share of the vectors in the rank.
        quota: what the collections of one key may hold.
        changes: carries out what clients change.
    """

    store: CollectionStore
    prepared: StoredCollection | None = None
    encoder: Encoder | None = None
    dense_weight: float = DENSE_WEIGHT
    quota: CollectionQuota = field(default_factory=CollectionQuota)
    changes: Changes = field(default_factory=Changes)
    _threads: ThreadPoolExecutor = field(default_factory=_reading_threads)
    _tending: asyncio.Task[None] | None = None
    _tended: float = -TEND_SECONDS

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what reads from the disk in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def check(self) -> None:
        """Raise :class:`EngineFailure` if the encoder has died."""
        if self.encoder is not None:
            self.encoder.engine.check()

    def tend(self) -> None:
        """Make collections whole in the background: call from the event loop, as often as you like.

        Vectors are missing after a server was stopped on the way, or was given another encoder, and an index after a
        machine stopped between a change and its naming. Of several replicas one makes a collection whole.
        """
        rested = time.monotonic() - self._tended >= TEND_SECONDS
        if rested and (self._tending is None or self._tending.done()):
            self._tending = asyncio.get_running_loop().create_task(self._tend())

    async def _tend(self) -> None:
        if self.prepared is not None:
            await self._make_whole(self.prepared)
        for store in (self.store, *await self.in_thread(self.store.owned)):
            for name in await self.in_thread(store.names):
                try:
                    collection = store.get(name)
                except NoSuchCollection:
                    # Deleted meanwhile.
                    continue
                await self._make_whole(collection)
        self._tended = time.monotonic()

    async def _make_whole(self, collection: StoredCollection) -> None:
        """Compute the vectors that ``collection`` has not, and its index, unless another replica does."""
        fingerprint = self.encoder.fingerprint if self.encoder is not None else None
        try:
            if await self.in_thread(lambda: collection.is_whole(fingerprint)):
                return
            with collection.turn("embed") as mine:
                if mine:
                    await self._embed(collection)
                    async with self.changes.turn(collection.path.parent):
                        await self.changes.in_thread(collection.build)
        except (CollectionError, EngineFailure, OSError) as error:
            # The others can still be searched, and this one by its words.
            log.warning("collection %s is not whole: %s", collection.path.name, error)

    async def _embed(self, collection: StoredCollection) -> None:
        """Compute missing vectors, a few at a time: changes by clients come between."""
        encoder = self.encoder
        if encoder is None:
            return
        changes, root, fingerprint = self.changes, collection.path.parent, encoder.fingerprint
        while True:
            async with changes.turn(root):
                rows = await changes.in_thread(lambda: collection.to_embed(fingerprint, EMBEDDED_TOGETHER))
            if not rows:
                return
            vectors = await encoder.vectors([text for _, text in rows])
            pairs = list(zip([number for number, _ in rows], vectors, strict=True))
            async with changes.turn(root):
                await changes.in_thread(functools.partial(collection.keep_vectors, fingerprint, pairs))
