"""The replica's side of :mod:`raylm.serving.retrieval.index_process`: as many processes as indexes are made at once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from pathlib import Path

from raylm.serving.helper_process import HelperProcess
from raylm.serving.retrieval.errors import CollectionUnreachable
from raylm.serving.retrieval.records import PassageRow

# Passages that go down the pipe together: to pack them holds Python's lock.
TOGETHER = 64
# For one index after its last passage; half a million passages take about two minutes.
ANSWER_SECONDS = 900.0


class Indexer:
    """Makes indexes in processes of their own; may be called from any thread."""

    def __init__(self) -> None:
        self._idle: list[HelperProcess] = []
        self._lock = threading.Lock()

    def write(self, rows: Iterable[PassageRow], directory: Path) -> None:
        """:func:`~raylm.serving.retrieval.index.write_index`, elsewhere.

        Raises:
            CollectionUnreachable: the process ended, or took too long.
            OSError: of the disk, as it comes.
        """
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or HelperProcess("raylm.serving.retrieval.index_process")
        try:
            error = _ask(process, rows, directory)
        except BaseException as failure:
            process.end(kill=True)
            if isinstance(failure, EOFError | ConnectionError):
                raise CollectionUnreachable("The process that makes indexes ended; try again later") from None
            raise
        with self._lock:
            self._idle.append(process)
        if error is not None:
            raise error

    def close(self) -> None:
        """End the processes that wait for work."""
        with self._lock:
            while self._idle:
                self._idle.pop().end()


def _ask(process: HelperProcess, rows: Iterable[PassageRow], directory: Path) -> OSError | None:
    connection = process.connection
    connection.send(str(directory))
    rest = iter(rows)
    while group := list(itertools.islice(rest, TOGETHER)):
        connection.send(group)
    connection.send(None)
    if not connection.poll(ANSWER_SECONDS):
        raise EOFError
    return connection.recv()
