"""Documents: the unit that sources give, that are split by hash, tokenized, and kept as Parquet beside the shards.

In: an iterator of :class:`Document`. Out: ``documents/train-*.parquet`` and ``documents/validation-*.parquet``, which
evaluation and serving read back as text. Relies on pyarrow alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.data.chat import pair_messages, user_message
from raylm.errors import UserError

Kind = Literal["documents", "pairs", "conversations"]
Split = Literal["train", "validation"]

# What a document of each kind has beside its title and text.
COLUMNS: dict[Kind, list[str]] = {
    "documents": ["aliases"],
    "pairs": ["prompt", "answer", "context"],
    "conversations": ["messages", "tools"],
}
# A row group is what a tokenizing task holds in memory at a time.
ROW_GROUP_DOCUMENTS = 4096
ROW_GROUP_BYTES = 2 << 20


@dataclass(frozen=True)
class Document:
    """A text with a title, a prompt/answer pair, or a conversation.

    Attributes:
        text: the text; of a pair, its user message and its answer on lines of their own; of a conversation, what each
            role says on lines of their own.
        title: what it is called, may be empty.
        prompt, answer, context: the parts of a pair; empty for plain text. The context may be empty for a pair too.
        split_key: text whose hash decides between training and validation; the document's own text where empty.
        split: the side that the source itself has decided on, or None.
        aliases: other names than the title, with spaces between; retrieval looks at them too.
        augmentation: how the document was made from another one: method, id of the original, number, with colons
            between; empty for an original.
        label: its class; empty where ``data.fields.label`` names no column.
        messages, tools: of a conversation, lists as JSON; empty for others, and where no tool is listed.
    """

    text: str
    title: str = ""
    prompt: str = ""
    answer: str = ""
    context: str = ""
    split_key: str = ""
    split: Split | None = None
    aliases: str = ""
    augmentation: str = ""
    label: str = ""
    messages: str = ""
    tools: str = ""

    @property
    def kind(self) -> Kind:
        """What it is."""
        return "conversations" if self.messages else "pairs" if self.prompt else "documents"

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages of a conversation."""
        return json.loads(self.messages)

    @property
    def answers(self) -> str:
        """What is said to what is asked; of plain text nothing."""
        if self.messages:
            return "\n".join(turn["content"] for turn in self.turns if turn["role"] == "assistant")
        return self.answer

    def on_side(self, split: Split) -> Document:
        """The same document, its side decided."""
        return replace(self, split=split)

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


def make_conversation(turns: list[dict[str, Any]], tools: list[Any], **attributes: str) -> Document:
    """Messages, each with role and content, as a document."""
    text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    listed = json.dumps(tools, ensure_ascii=False) if tools else ""
    return Document(text=text, messages=json.dumps(turns, ensure_ascii=False), tools=listed, **attributes)


def as_conversation(document: Document) -> Document:
    """The document itself, or a pair as a conversation of two messages."""
    if document.messages:
        return document
    made = make_conversation(pair_messages(document.prompt, document.answer, document.context), [])
    return replace(document, text=made.text, messages=made.messages)


def split_of(document: Document, validation_fraction: float) -> Split:
    """The side that a document belongs to, by its hash alone.

    Adding documents moves no other, and identical texts are on one side. Documents of the embedded corpora are keyed
    by their dotted name, so that a passage and the question about it never part.
    """
    if document.split is not None:
        return document.split
    if not validation_fraction:
        return "train"
    share = hash_share(document.split_key or document.text, b"raylm-split")
    return "validation" if share < validation_fraction else "train"


def side_of(document: Document, sole_split: Split | None, validation_fraction: float) -> Split | None:
    """The document's side; None where its prepared source holds it for the other one.

    Args:
        document: the document.
        sole_split: the one side that its source gives to, where there is a validation source.
        validation_fraction: share that is held out where there is none.
    """
    if sole_split is None:
        return split_of(document, validation_fraction)
    return sole_split if document.split in (None, sole_split) else None


def hash_share(text: str, purpose: bytes) -> float:
    """A number in [0, 1) that ``text`` alone decides, another one for every purpose."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose)
    return int.from_bytes(digest.digest(), "big") / 2**64


class DocumentFile:
    """Writes documents to one Parquet file, which appears under its name when it is whole.

    Args:
        path: the file.
        kind: decides the columns.
        with_split: write a part of an unfinished set, with each document's side as a column.
        columns: further attributes of documents to write.

    Attributes:
        documents: documents written so far.
        bytes: their text in UTF-8.
    """

    def __init__(self, path: Path, kind: Kind, with_split: bool = False, columns: tuple[str, ...] = ()) -> None:
        names = ["title", "text", *COLUMNS[kind]]
        # A part is read again by its next task only, which needs the side and no id.
        names = [*names, "split"] if with_split else ["id", *names, "augmentation"]
        names += columns
        self._compression = "lz4" if with_split else "zstd"
        self._schema = pa.schema([(name, pa.string()) for name in names])
        # A task must not write into the file of one that it took for dead.
        self.path, self._partial = path, path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._rows: list[Document] = []
        self._splits: list[Split | None] = []
        self._row_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self.documents = self.bytes = 0

    def __enter__(self) -> DocumentFile:
        return self

    def write(self, document: Document, split: Split | None = None) -> None:
        """Append one document; ``split`` is its side where that has been decided since it was made."""
        size = document.byte_count
        self._rows.append(document)
        self._splits.append(split or document.split)
        self._row_bytes += size
        self.documents += 1
        self.bytes += size
        if self._row_bytes >= ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._partial, self._schema, compression=self._compression)
        if not self._rows:
            return
        columns = [
            self._splits if name == "split" else [getattr(row, name) for row in self._rows]
            for name in self._schema.names
        ]
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(self._rows))
        self._rows, self._splits, self._row_bytes = [], [], 0

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self._flush()
            self._writer.close()
            flush_to_disk(self._partial)
            self._partial.replace(self.path)
        elif self._writer is not None:
            self._writer.close()
            self._partial.unlink(missing_ok=True)


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
    """The documents of one file written by :class:`DocumentFile`, a row group at a time.

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
