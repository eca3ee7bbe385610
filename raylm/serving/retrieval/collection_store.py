"""The collections of a directory by their names, each a :class:`~raylm.serving.retrieval.store.StoredCollection`."""

from __future__ import annotations

from pathlib import Path

from raylm.serving.retrieval.store import NAME, NoSuchCollection, StoredCollection


class CollectionStore:
    """The collections of a directory.

    Args:
        root: made when the first collection is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, StoredCollection] = {}

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
        if not NAME.fullmatch(name) or not (self.root / name / "CURRENT").is_file():
            self._known.pop(name, None)
            raise NoSuchCollection(f"The collection '{name}' does not exist")
        return self._known.setdefault(name, StoredCollection(self.root / name))

    def delete(self, name: str) -> None:
        """Remove a collection."""
        self.get(name).delete()
        self._known.pop(name, None)
