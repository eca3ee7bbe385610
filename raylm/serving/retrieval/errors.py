"""Why a collection does not do what is asked, and what went wrong in SQLite or on the disk in these words.

The text of each is one line for the client.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

# What a full disk, a full quota of the file system, or a limit on file sizes says; numpy's short writes say nothing.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None}
_NOT_NOW = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_NOT_REACHED = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}


class CollectionError(Exception):
    """A collection cannot do what is asked; the text says why."""


class NoSuchCollection(CollectionError):
    """There is no collection of that name (any more), or it is another key's."""


class CollectionExists(CollectionError):
    """The name is taken."""


class CollectionDamaged(CollectionError):
    """Its files are not what was written; others are not concerned."""


class CollectionBusy(CollectionError):
    """Too many changes wait, or one takes too long; later it may work."""


class CollectionUnreachable(CollectionError):
    """The disk cannot be read or written at all."""


class NoRoom(CollectionError):
    """The disk is full; nothing was changed."""


class QuotaExceeded(CollectionError):
    """The key's collections would hold more than they may; nothing was changed."""


@contextlib.contextmanager
def told(path: Path, name: str | None = None) -> Iterator[None]:
    """Say what goes wrong in the block, with the collection at ``path``, in the words of this module.

    Args:
        name: what the collection is called, where its directory is not yet.
    """
    name = name or path.name
    try:
        yield
    except sqlite3.Error as error:
        raise _of_database(path, name, error) from None
    except TimeoutError:
        # An OSError without a number as well, but none of the disk.
        raise
    except OSError as error:
        raise _of_disk(path, name, error) from None


def _of_database(path: Path, name: str, error: sqlite3.Error) -> CollectionError:
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    code = extended & 0xFF
    if code in _NOT_NOW:
        return CollectionBusy(f"The collection '{name}' is in use; try again later")
    # A limit on the size of files is an error of writing, which SQLite does not tell from others.
    if code == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_WRITE:
        return _no_room(name)
    if not path.is_dir():
        return NoSuchCollection(f"The collection '{name}' does not exist")
    if code in _NOT_REACHED and (path / "documents.sqlite").is_file():
        return CollectionUnreachable(f"The collection '{name}' cannot be used: {error}")
    return damaged(name, error)


def _of_disk(path: Path, name: str, error: OSError) -> CollectionError:
    if error.errno in _NO_ROOM:
        return _no_room(name)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if not path.is_dir():
            return NoSuchCollection(f"The collection '{name}' does not exist")
        return damaged(name, f"{Path(error.filename).name} is missing")
    return CollectionUnreachable(f"The collection '{name}' cannot be used: {error.strerror}")


def damaged(name: str, reason: object) -> CollectionDamaged:
    """The error of a collection whose files are not what was written."""
    return CollectionDamaged(
        f"The collection '{name}' is damaged ({_one_line(reason)}); delete it and add its documents again"
    )


def _no_room(name: str) -> NoRoom:
    return NoRoom(f"No room is left on the server's disk for the collection '{name}'; nothing was changed")


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:200]
