"""The process in which indexes are made: Python's lock would stop a replica's searches and its health meanwhile.

A directory's path comes down the pipe, then passages in groups, then None; what went wrong goes back, or None. Each
index is made in a fork, whose memory is free again afterwards. The process ends when the pipe does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from raylm.serving.retrieval.index import write_index
from raylm.serving.retrieval.records import PassageRow


def _make(connection: Connection, directory: Path) -> None:
    """Make one index; an error of the disk goes back once all passages have come."""
    groups: Iterator[list[PassageRow] | None] = iter(connection.recv, None)
    try:
        write_index((row for group in groups if group for row in group), directory)
    except OSError as error:
        # What is left in the pipe would be taken for the next index.
        for _ in groups:
            pass
        connection.send(error)
    else:
        connection.send(None)


def main(descriptor: int) -> None:
    """Make what comes down the pipe until it ends.

    Args:
        descriptor: of the pipe's end, inherited from the replica.
    """
    # Ctrl-C in a terminal reaches every process; the replica decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(descriptor) as connection:
        while True:
            try:
                directory = connection.recv()
            except (EOFError, OSError):
                return
            if (child := os.fork()) == 0:
                status = 1
                # Whatever happens, this copy of the process must not go on as the process itself.
                try:
                    _make(connection, Path(directory))
                    status = 0
                finally:
                    os._exit(status)
            if os.waitpid(child, 0)[1]:
                # Nobody knows what of the passages is still in the pipe.
                return


if __name__ == "__main__":
    main(int(sys.argv[1]))
