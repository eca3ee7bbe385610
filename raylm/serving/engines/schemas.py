"""The replica's side of :mod:`raylm.serving.engines.schema_process`: asks what is wrong with a
schema or grammar, and remembers.

The process starts with the first one and stays; where it dies, the next schema starts another.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from raylm.serving.engines.base import Constraint
from raylm.serving.helper_process import HelperProcess

# Schemas whose outcome is remembered, and schemas that may wait for theirs.
REMEMBERED = 1024
MOST_WAITING = 16
# For one answer, the start of the process included: a stopped process is not waited for any longer.
ANSWER_SECONDS = 120.0


class SchemasUnavailable(Exception):
    """A schema was not tried, which says nothing about it; the text says why."""


class SchemaChecker:
    """Tries JSON schemas in a process of their own, one at a time.

    Args:
        answer_seconds: longest wait for one answer.
    """

    def __init__(self, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._answer_seconds = answer_seconds
        # One thread: the process has one pipe. Its own, so that schemas take no threads from anything else.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="schemas")
        self._process: HelperProcess | None = None
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._asked: dict[bytes, asyncio.Future[str | None]] = {}

    async def mistake_in(self, constraint: Constraint, source: str | None) -> str | None:
        """Why the schema or grammar cannot be followed; None where it can.

        Args:
            constraint: what a text is to be.
            source: directory of the model whose tokens the grammar is compiled for; None only makes the grammar.

        Raises:
            SchemasUnavailable: too many wait, or the process ended.
        """
        key = hashlib.sha256(f"{source}\n{constraint.kind} {constraint.compact}\n{constraint.text}".encode()).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if key not in self._asked:
            if len(self._asked) >= MOST_WAITING:
                raise SchemasUnavailable(
                    f"{constraint.parameter}: too many schemas wait to be compiled; try again later"
                )
            asked = asyncio.get_running_loop().run_in_executor(self._thread, self._ask, constraint, source)
            self._asked[key] = asked
            asked.add_done_callback(lambda done: self._answered(key, done))
        # A client that leaves does not take the answer from the others who wait for it.
        return await asyncio.shield(self._asked[key])

    def _answered(self, key: bytes, asked: asyncio.Future[str | None]) -> None:
        del self._asked[key]
        if asked.cancelled() or asked.exception() is not None:
            return
        self._known[key] = asked.result()
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def close(self) -> None:
        """End the process and the thread."""
        self._thread.submit(self._end)
        self._thread.shutdown(wait=True)

    def _ask(self, constraint: Constraint, source: str | None) -> str | None:
        """The process's answer; runs on the thread."""
        if self._process is None:
            self._process = HelperProcess("raylm.serving.engines.schema_process")
        connection = self._process.connection
        try:
            connection.send((constraint, source))
            if connection.poll(self._answer_seconds):
                return connection.recv()
        except (EOFError, OSError):
            self._end()
            raise SchemasUnavailable(
                f"{constraint.parameter}: the process that compiles schemas ended; try again"
            ) from None
        self._end(kill=True)
        raise SchemasUnavailable(f"{constraint.parameter}: it was not compiled within {self._answer_seconds:g} s")

    def _end(self, *, kill: bool = False) -> None:
        if self._process is not None:
            self._process.end(kill=kill)
            self._process = None
