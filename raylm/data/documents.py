"""Documents: the unit that sources give, that are split by hash, tokenized, and kept as Parquet beside the shards.

In: an iterator of :class:`Document`. Out: ``documents/train-*.parquet`` and ``documents/validation-*.parquet``, which
evaluation and serving read back as text. Relies on pyarrow alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.data.chat import user_message
from raylm.errors import UserError

Kind = Literal["documents", "pairs"]
Split = Literal["train", "validation"]

# A row group is what a tokenizing task holds in memory at a time.
ROW_GROUP_DOCUMENTS = 4096
ROW_GROUP_BYTES = 8 << 20


@dataclass(frozen=True)
class Document:
    """A text with a title, or a prompt/answer pair.

    Attributes:
        text: the text; of a pair, its user message and its answer on lines of their own.
        title: what it is called, may be empty.
        prompt, answer, context: the parts of a pair; empty for plain text. The context may be empty for a pair too.
        split_key: text whose hash decides between training and validation; the document's own text where empty.
        split: the side that the source itself has decided on, or None.
        aliases: other names than the title, with spaces between; retrieval looks at them too.
    """

    text: str
    title: str = ""
    prompt: str = ""
    answer: str = ""
    context: str = ""
    split_key: str = ""
    split: Split | None = None
    aliases: str = ""

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the text's hash: the same text has the same id in every set."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()

    @property
    def byte_count(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


def make_pair(prompt: str, answer: str, context: str = "", **attributes: str) -> Document:
    """A pair as a document, its text made of its parts."""
    text = f"{user_message(prompt, context)}\n{answer}"
    return Document(text=text, prompt=prompt, answer=answer, context=context, **attributes)


def split_of(document: Document, validation_fraction: float) -> Split:
    """The side that a document belongs to, by its hash alone.

    Adding documents moves no other, and identical texts are on one side. Documents of the embedded corpora are keyed
    by their dotted name, so that a passage and the question about it never part.
    """
    if document.split is not None:
        return document.split
    digest = hashlib.blake2b((document.split_key or document.text).encode(), digest_size=8, person=b"raylm-split")
    share = int.from_bytes(digest.digest(), "big") / 2**64
    return "validation" if share < validation_fraction else "train"


class DocumentWriter:
    """Writes one split's documents to ``<directory>/<split>-00000.parquet`` and so on.

    A file ends when it holds ``file_bytes`` of text, so the cut depends on the documents alone. Each file becomes one
    token file. Used as a context manager; a file appears under its name when it is whole.

    Attributes:
        documents: documents written so far.
        bytes: their text in UTF-8.
        paths: the whole files, in order.
    """

    def __init__(self, directory: Path, split: Split, kind: Kind, file_bytes: int) -> None:
        names = ["id", "title", "text"] + (["prompt", "answer", "context"] if kind == "pairs" else ["aliases"])
        self._schema = pa.schema([(name, pa.string()) for name in names])
        self._directory, self._split, self._file_bytes = directory, split, file_bytes
        self._rows: list[Document] = []
        self._row_bytes = self._written_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self.documents = self.bytes = 0
        self.paths: list[Path] = []

    def __enter__(self) -> DocumentWriter:
        return self

    def write(self, document: Document) -> None:
        """Append one document."""
        size = document.byte_count
        self._rows.append(document)
        self._row_bytes += size
        self.documents += 1
        self.bytes += size
        file_is_full = self._written_bytes + self._row_bytes >= self._file_bytes
        if file_is_full or self._row_bytes >= ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_DOCUMENTS:
            self._flush()
        if file_is_full:
            self._finish_file()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        columns = [[getattr(row, name) for row in self._rows] for name in self._schema.names]
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(self._rows))
        self._written_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self.paths):05d}.parquet"

    @property
    def _partial(self) -> Path:
        return self._path.with_name(f".{self._path.name}.partial")

    def _finish_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        flush_to_disk(self._partial)
        self._partial.replace(self._path)
        self.paths.append(self._path)
        self._written_bytes = 0

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self._flush()
            self._finish_file()
        elif self._writer is not None:
            self._writer.close()


def flush_to_disk(path: Path) -> None:
    """Return when the file's content survives a loss of power."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def document_files(directory: Path, split: Split) -> list[Path]:
    """The Parquet files of a split of a prepared directory, in order."""
    return sorted((directory / "documents").glob(f"{split}-[0-9]*.parquet"))


def read_documents(directory: Path | str, split: Split) -> Iterator[Document]:
    """The documents of a prepared directory in their order, a row group at a time.

    Raises:
        UserError: a file is damaged.
    """
    for path in document_files(Path(directory), split):
        for group in read_row_groups(path):
            for document in group:
                yield replace(document, split=split)


def read_row_groups(path: Path) -> Iterator[list[Document]]:
    """The documents of one file written by :class:`DocumentWriter`, a row group at a time.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group).to_pylist()
                yield [Document(**{key: value for key, value in row.items() if key != "id"}) for row in rows]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise UserError(
            f"{path}: damaged document file: {str(error).splitlines()[0]}; prepare the data again"
        ) from None
