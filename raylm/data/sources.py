"""From ``data.train`` and ``data.validation`` to sources that can be read again and again.

A source is an embedded corpus, files (a path, a glob, a directory), a hub dataset, or a directory that ``raylm
prepare`` made. Opening one checks that it exists; reading it checks every row. Nothing here writes.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from raylm.config.data import STDLIB_DOCS, STDLIB_PAIRS, DataSection
from raylm.data.documents import Document, document_files, read_documents
from raylm.data.readers import READERS, SUFFIXES
from raylm.errors import UserError

MANIFEST = "manifest.json"


class Source(Protocol):
    """Where documents come from.

    Attributes:
        name: what the user called it.
    """

    name: str

    def documents(self) -> Iterator[Document]:
        """All documents from the beginning, empty ones included; raises UserError on bad input."""


class EmbeddedSource:
    """``stdlib-docs`` or ``stdlib-pairs``; read once, kept for the second pass."""

    def __init__(self, name: str, with_context: bool) -> None:
        self.name, self._with_context = name, with_context
        self._documents: list[Document] | None = None

    def documents(self) -> Iterator[Document]:
        """See :class:`Source`."""
        from raylm.data.stdlib import stdlib_documents, stdlib_pairs

        if self._documents is None:
            self._documents = stdlib_documents()
            if self.name == STDLIB_PAIRS:
                self._documents = stdlib_pairs(self._documents, self._with_context)
        return iter(self._documents)


class FileSource:
    """Files that a path, a directory or a glob stands for, in the order of their names."""

    def __init__(self, name: str, files: list[tuple[Path, str]], data: DataSection) -> None:
        self.name, self._files, self._data = name, files, data

    def documents(self) -> Iterator[Document]:
        """See :class:`Source`."""
        for path, file_format in self._files:
            try:
                yield from READERS[file_format](path, self._data)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


class PreparedSource:
    """The documents of a prepared directory, each on the side where it was."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self._directory = name, directory

    def documents(self) -> Iterator[Document]:
        """See :class:`Source`."""
        yield from read_documents(self._directory, "train")
        yield from read_documents(self._directory, "validation")


def open_sources(data: DataSection, names: list[str], key: str) -> list[Source]:
    """Sources for ``names``; ``key`` (data.train or data.validation) names them in errors.

    Raises:
        UserError: a path does not exist, a glob matches nothing, or a format is unknown.
    """
    return [_open_source(data, name, key) for name in names]


def _open_source(data: DataSection, name: str, key: str) -> Source:
    if name in (STDLIB_DOCS, STDLIB_PAIRS):
        return EmbeddedSource(name, with_context=data.fields.context is not None)
    if data.format == "hub":
        from raylm.data.hub import HubSource

        return HubSource(name, data, key)
    path = Path(name).expanduser()
    if data.format == "prepared" or (data.format == "auto" and (path / MANIFEST).is_file()):
        return PreparedSource(name, _prepared_directory(path, key))
    return FileSource(name, _files(path, name, data, key), data)


def _prepared_directory(path: Path, key: str) -> Path:
    if not (path / MANIFEST).is_file():
        raise UserError(f"{key}: {path} is not a prepared directory (no {MANIFEST}); make one with raylm prepare")
    if not document_files(path, "train"):
        raise UserError(f"{key}: {path} holds no documents/train-*.parquet; prepare the data again")
    return path


def _files(path: Path, name: str, data: DataSection, key: str) -> list[tuple[Path, str]]:
    """(file, format) for everything that ``name`` stands for, sorted."""
    known = f"{', '.join(SUFFIXES)}, or data.format"
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        pairs = [(file, SUFFIXES[file.suffix.lower()]) for file in found if file.suffix.lower() in SUFFIXES]
        if data.format != "auto":
            pairs = [(file, file_format) for file, file_format in pairs if file_format == data.format]
        if not pairs:
            raise UserError(f"{key}: directory {name} holds no file of format {data.format}; allowed suffixes: {known}")
        return pairs
    if path.is_file():
        found = [path]
    elif glob.has_magic(name):
        found = _matches(path, name, key)
        if not found:
            raise UserError(f"{key}: no file matches '{name}'")
    else:
        hint = "; a hub name needs data.format=hub" if name.count("/") <= 1 and not path.suffix else ""
        raise UserError(f"{key}: {name} does not exist{hint}")
    pairs = []
    for file in found:
        file_format = SUFFIXES.get(file.suffix.lower()) if data.format == "auto" else data.format
        if file_format is None:
            raise UserError(f"{key}: {file}: unknown suffix '{file.suffix}', allowed: {known}")
        pairs.append((file, file_format))
    return pairs


def _matches(pattern: Path, name: str, key: str) -> list[Path]:
    base = Path(pattern.anchor or ".")
    try:
        found = list(base.glob(str(pattern.relative_to(pattern.anchor))))
    except ValueError as error:
        raise UserError(f"{key}: '{name}' is no glob: {error}") from None
    return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
