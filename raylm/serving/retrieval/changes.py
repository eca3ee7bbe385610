"""Changes of collections: one at a time for each key over all replicas, finished even when the client has left.

They run in threads of their own, so that searches never wait for them, and wait for their turn in the event loop, so
that those of one key hold no thread that another key could use.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from raylm.serving.retrieval.errors import CollectionBusy, told

THREADS = 4
# Changes that are in work or wait for their turn at a replica: each holds its documents in memory.
MOST_OF_ONE, MOST_OF_ALL = 16, 64
TURN_SECONDS = 60.0
# Between two looks at what another replica holds.
LOOK_SECONDS = 0.05

T = TypeVar("T")
log = logging.getLogger("raylm.serving")


class Changes:
    """Takes changes in, and carries each out in its turn."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="collection-change")
        self._turns: dict[Path, asyncio.Lock] = {}
        self._admitted: Counter[Path] = Counter()
        self._tasks: set[asyncio.Task[object]] = set()

    async def carry_out(self, root: Path, change: Callable[[], Awaitable[T]]) -> T:
        """Run ``change`` to its end, alone among those of the collections in ``root``, even if the caller leaves.

        Raises:
            CollectionBusy: too many wait, or the turn did not come in a minute.
        """
        if self._admitted[root] >= MOST_OF_ONE or self._admitted.total() >= MOST_OF_ALL:
            raise CollectionBusy(f"{self._admitted[root]} changes of collections are waiting; try again later")
        self._admitted[root] += 1
        task = asyncio.create_task(self._in_turn(root, change))
        self._tasks.add(task)
        task.add_done_callback(lambda done: (self._tasks.discard(done), self._leave(root)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_report)
            raise

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what blocks in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @contextlib.asynccontextmanager
    async def turn(self, root: Path) -> AsyncIterator[None]:
        """Wait until no other change of the collections in ``root`` runs, in this or another replica.

        Raises:
            CollectionBusy: not within a minute.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    await stack.enter_async_context(self._turns.setdefault(root, asyncio.Lock()))
                    await _lock(root, stack)
            except TimeoutError:
                raise CollectionBusy("Another change of these collections takes long; try again later") from None
            yield

    async def _in_turn(self, root: Path, change: Callable[[], Awaitable[T]]) -> T:
        async with self.turn(root):
            return await change()

    def _leave(self, root: Path) -> None:
        self._admitted[root] -= 1
        if not self._admitted[root]:
            del self._admitted[root]


async def _lock(root: Path, stack: contextlib.AsyncExitStack) -> None:
    """Hold the lock file of ``root`` until the ``stack`` ends."""
    with told(root):
        root.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context((root / ".change.lock").open("a"))
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(LOOK_SECONDS)
        else:
            return


def _report(task: asyncio.Task[object]) -> None:
    """Say why a change failed whose client has left."""
    if not task.cancelled() and task.exception() is not None:
        log.warning("a change of a collection whose client had left failed: %s", task.exception())
