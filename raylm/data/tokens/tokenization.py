"""Parts to the files of the prepared set: duplicates left out, documents kept as Parquet, tokens and their index.

The second pass of ``prepare``. A task reads its part a row group at a time and writes ``documents/<split>-N.parquet``,
``<split>/tokens-N.bin`` and its index under temporary names, renamed when whole. What it returns goes into the
manifest; ``work/files/N.json`` says that it is done.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raylm.config.run_directory import write_atomically
from raylm.data.cleaning.duplicates import dropped_documents
from raylm.data.prepare.parts import WORK
from raylm.data.sources.documents import (
    Document,
    DocumentFile,
    Kind,
    Split,
    as_conversation,
    flush_to_disk,
    hash_share,
    read_row_groups,
)
from raylm.data.tokens.conversation_encoding import ConversationEncoder
from raylm.data.tokens.encoding import DocumentEncoder, PairEncoder

Encoder = DocumentEncoder | PairEncoder | ConversationEncoder
WEIGHT_PURPOSE = b"raylm-weight"
# Folder of the parts that augmentation has made others of.
AUGMENTED = "augmented"


@dataclass(frozen=True)
class ShardFormat:
    """What all token files of a set share: the tokenizer's ids, the dtype's name, what a document is, and whether it
    has a class."""

    kind: Kind
    dtype: str
    eos_id: int
    unknown_id: int | None
    labels: bool = False


def make_files(
    job: dict[str, Any], directory: str, layout: dict[str, Any], duplicates: list[str], weights: list[float]
) -> dict[str, Any]:
    """The Ray Data task: one part to its files.

    Args:
        job: ``number`` of the files; ``part``, its name; ``source``; ``first``, the number of its first document;
            ``documents``; ``copy``, from 0, of a source that is taken more than once; ``leading``, the splits whose
            stream begins here.
        directory: the set that is being prepared.
        layout: see :class:`ShardFormat`.
        duplicates: files of duplicates in the work directory.
        weights: of each source.

    Returns:
        ``{"entries": [one a split that is not empty], "duplicates": documents left out as such}``.
    """
    root, shape = Path(directory), ShardFormat(**layout)
    work = root / WORK
    dropped = dropped_documents(work, duplicates, job["first"], job["first"] + job["documents"]) - job["first"]
    writers = {
        split: TokenWriter(root, split, job["number"], shape, leading=split in job["leading"])
        for split in ("train", "validation")
    }
    for documents in surviving(work, job["part"], dropped):
        for split, writer in writers.items():
            chosen = [document for document in documents if document.split == split]
            if split == "train":
                chosen = [document for document in chosen if is_taken(document, weights[job["source"]], job["copy"])]
            elif job["copy"]:
                chosen = []
            if chosen:
                writer.write(chosen)
    entries = [entry for writer in writers.values() if (entry := writer.finish()) is not None]
    result = {"entries": entries, "duplicates": 0 if job["copy"] else len(dropped)}
    write_atomically(work / "files" / f"{job['number']:06d}.json", json.dumps(result))
    return result


def surviving(work: Path, part: str, dropped: np.ndarray) -> Iterator[list[Document]]:
    """The documents that a part gives to the set, a row group at a time; augmented where that is done."""
    augmented = work / AUGMENTED / f"{part}.parquet"
    return read_row_groups(augmented) if augmented.is_file() else without_duplicates(work, part, dropped)


def without_duplicates(work: Path, part: str, dropped: np.ndarray) -> Iterator[list[Document]]:
    """The documents of a part, a row group at a time, without the rows in ``dropped`` (sorted)."""
    row = 0
    for group in read_row_groups(work / "parts" / f"{part}.parquet"):
        out = set(dropped[np.searchsorted(dropped, row) : np.searchsorted(dropped, row + len(group))].tolist())
        yield [document for place, document in enumerate(group, start=row) if place not in out] if out else group
        row += len(group)


def is_taken(document: Document, weight: float, copy: int) -> bool:
    """Whether a document of a source with ``weight`` is in the source's copy with this number, from 0.

    A weight of 2.3 takes every document twice and three in ten, chosen by hash, a third time.
    """
    return copy + 1 <= weight or (copy < weight and hash_share(document.text, WEIGHT_PURPOSE) < weight - copy)


@functools.lru_cache(maxsize=1)
def open_encoder(tokenizer: Path, kind: Kind, eos_id: int, _: os.stat_result) -> Encoder:
    """The encoder of a tokenizer directory, kept by its process: a tokenizer remembers the words that it has seen."""
    if kind == "documents":
        return DocumentEncoder(tokenizer, eos_id)
    return PairEncoder(tokenizer) if kind == "pairs" else ConversationEncoder(tokenizer)


class TokenWriter:
    """Writes one split's files of a part: documents, tokens, index. Nothing is written where no document comes.

    Args:
        root: the set that is being prepared.
        split: train or validation.
        number: of the files.
        layout: see :class:`ShardFormat`.
        leading: the split's stream begins with this file.
    """

    def __init__(self, root: Path, split: Split, number: int, layout: ShardFormat, leading: bool) -> None:
        self._root, self._split, self._number, self._layout = root, split, number, layout
        self._leading = leading
        self._stream: Any = None
        self._rows: list[np.ndarray] = []
        self._counted: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self._position = self._unknown = 0

    def _open(self) -> None:
        folder = self._root / self._split
        for path in (folder, self._root / "documents"):
            path.mkdir(exist_ok=True)
        self._path = folder / f"tokens-{self._number:05d}.bin"
        # A task must not write into the file of one that it took for dead.
        self._partial = folder / f".{self._path.name}.{os.getpid()}.partial"
        self._stream = self._partial.open("wb")
        kind, tokenizer = self._layout.kind, self._root / "tokenizer"
        self._encoder = open_encoder(tokenizer, kind, self._layout.eos_id, (tokenizer / "tokenizer.json").stat())
        self._documents = DocumentFile(
            self._root / "documents" / f"{self._split}-{self._number:05d}.parquet",
            kind,
            columns=("label",) if self._layout.labels else (),
        )
        if self._leading and kind == "documents":
            # The stream begins as every document does: after an end-of-text token.
            self._append(np.array([self._layout.eos_id]))

    def _append(self, ids: np.ndarray) -> None:
        content = ids.astype(self._layout.dtype).tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self._position += len(ids)

    def write(self, documents: list[Document]) -> None:
        """Append documents, at least one."""
        if self._stream is None:
            self._open()
        if self._layout.kind == "conversations":
            documents = [as_conversation(document) for document in documents]
        tokens, columns, *counted = self._encoder.encode(documents)
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        starts = self._position + np.cumsum(lengths) - lengths
        self._rows.append(np.concatenate([starts[:, None], columns], axis=1))
        joined = np.concatenate(tokens)
        self._counted += counted[0] if counted else []
        self._append(joined)
        for document in documents:
            self._documents.write(document)
        if self._layout.unknown_id is not None:
            self._unknown += int(np.count_nonzero(joined == self._layout.unknown_id))

    def finish(self) -> dict[str, Any] | None:
        """Name the files and return their entry in the manifest; None where there is none."""
        if self._stream is None:
            return None
        self._stream.close()
        flush_to_disk(self._partial)
        self._partial.replace(self._path)
        self._documents.__exit__(None, None, None)
        index = np.concatenate(self._rows)
        arrays = {"index": index}
        if self._layout.kind == "conversations":
            arrays["counted"] = np.concatenate(self._counted)
        text = self._documents.path
        return {
            "split": self._split,
            "path": f"{self._split}/{self._path.name}",
            "tokens": self._position,
            "sha256": self._digest.hexdigest(),
            "documents": len(index),
            "bytes": self._documents.bytes,
            "unknown_tokens": self._unknown,
            **{name: self._saved(name, array) for name, array in arrays.items()},
            "text": {"path": f"documents/{text.name}", "sha256": hashlib.sha256(text.read_bytes()).hexdigest()},
        }

    def _saved(self, name: str, array: np.ndarray) -> dict[str, str]:
        """Write an array beside the tokens; its entry in the manifest."""
        path = self._path.with_name(f"{name}-{self._number:05d}.npy")
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as stream:
            np.save(stream, array)
        flush_to_disk(partial)
        partial.replace(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"path": f"{self._split}/{path.name}", "sha256": sha256}
