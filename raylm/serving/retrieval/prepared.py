"""Documents that ``raylm prepare`` left, as a collection: indexed once, and again when they have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet

from raylm.errors import UserError
from raylm.serving.retrieval.errors import CollectionExists
from raylm.serving.retrieval.records import StoredDocument
from raylm.serving.retrieval.store import StoredCollection

COLUMNS = ("id", "title", "text")
OPTIONAL_COLUMNS = ("aliases",)
# Of the way from documents to an index: another one makes all indexes anew.
FORMAT = "2"


def collection_files(directory: str | Path, key: str = "serving.collection") -> list[Path]:
    """The document files of a directory that ``raylm prepare`` made; checks that they can be read.

    Raises:
        UserError: no such directory, no documents in it, or files of another kind.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise UserError(f"{key}: {directory} does not exist; allowed: a directory made by `raylm prepare`")
    files = sorted((root / "documents").glob("*.parquet"))
    if not files:
        raise UserError(f"{key}: {directory} has no documents/*.parquet; allowed: a directory made by `raylm prepare`")
    rows = 0
    for file in files:
        try:
            description = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {file} cannot be read: {error}") from None
        missing = [column for column in COLUMNS if column not in description.schema_arrow.names]
        if missing:
            raise UserError(f"{key}: {file} has no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
        rows += description.metadata.num_rows
    if not rows:
        raise UserError(f"{key}: {directory} holds no documents")
    return files


def open_prepared(directory: str | Path, path: Path) -> StoredCollection:
    """The collection of a prepared directory's documents, made at ``path`` if it is not there or out of date.

    Args:
        directory: made by ``raylm prepare``; only read.
        path: where the collection is kept; of several processes one makes it, and the others wait.
    """
    files = collection_files(directory)
    fingerprint = _fingerprint(files)
    try:
        collection = StoredCollection.create(path)
    except CollectionExists:
        collection = StoredCollection(path)
    with collection.locked("import"):
        if collection.fact("source") != fingerprint:
            collection.clear()
            collection.add(_documents(files))
            collection.keep_fact("source", fingerprint)
    collection.build()
    return collection


def _documents(files: list[Path]) -> Iterator[StoredDocument]:
    for file in files:
        names = set(parquet.read_schema(file).names)
        columns = [*COLUMNS, *(name for name in OPTIONAL_COLUMNS if name in names)]
        for batch in parquet.ParquetFile(file).iter_batches(1024, columns=columns):
            for row in batch.to_pylist():
                yield StoredDocument(row["id"], row["title"] or "", row["text"] or "", row.get("aliases") or "")


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256(FORMAT.encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
