"""The collections of a directory by their names, each a :class:`~raylm.serving.retrieval.store.StoredCollection`.

``<root>/<name>`` are common, ``<root>/@<hash>/<name>`` belong to the API key of that hash: no two keys share names.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from raylm.serving.retrieval.errors import NoSuchCollection
from raylm.serving.retrieval.index import write_index
from raylm.serving.retrieval.records import PassageRow, Usage
from raylm.serving.retrieval.store import NAME, StoredCollection

# Collections whose indexes a process keeps open.
MOST_OPEN = 64
# Of a key's hash: enough that no two keys share a directory.
OWNER_CHARACTERS = 32


class CollectionStore:
    """The collections of a directory.

    Args:
        root: made when the first collection is.
        write: makes an index of passages in a new directory.
    """

    def __init__(self, root: Path, write: Callable[[Iterable[PassageRow], Path], None] = write_index) -> None:
        self.root = root
        # The one object of a process for a collection's directory.
        self._opened = functools.lru_cache(MOST_OPEN)(functools.partial(StoredCollection, write=write))

    def of(self, owner: str) -> CollectionStore:
        """The collections of the API key whose SHA-256 is ``owner``, hexadecimal."""
        return self._at(self.root / f"@{owner[:OWNER_CHARACTERS]}")

    def owned(self) -> list[CollectionStore]:
        """The collections of each key that has made any."""
        if not self.root.is_dir():
            return []
        roots = sorted(path for path in self.root.iterdir() if path.name.startswith("@") and path.is_dir())
        return [self._at(path) for path in roots]

    def names(self) -> list[str]:
        """Names of all collections, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if NAME.fullmatch(path.name) and path.is_dir())

    def create(self, name: str) -> StoredCollection:
        """Make an empty collection; ``name`` must match :data:`NAME`."""
        StoredCollection.create(self.root / name)
        return self.get(name)

    def get(self, name: str) -> StoredCollection:
        """The collection called ``name``.

        Raises:
            NoSuchCollection: there is none.
        """
        if not NAME.fullmatch(name) or not (self.root / name).is_dir():
            raise NoSuchCollection(f"The collection '{name}' does not exist")
        return self._opened(self.root / name)

    def delete(self, name: str) -> None:
        """Remove a collection."""
        self.get(name).delete()

    def usage(self, besides: str | None = None) -> Usage:
        """What all collections hold together; without the one called ``besides``."""
        each = [self._opened(self.root / name).usage() for name in self.names() if name != besides]
        return Usage(sum(usage.documents for usage in each), sum(usage.bytes for usage in each))

    def _at(self, root: Path) -> CollectionStore:
        """The collections of another directory, whose objects are this one's."""
        store = copy.copy(self)
        store.root = root
        return store
