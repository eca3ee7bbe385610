"""Token shards on disk: the manifest, and memory-mapped reading across files.

A prepared directory is whole when it has ``manifest.json``, which is written last and holds the size and checksum of
every file. A split's token files are one stream: of documents, ``<eos> document <eos> document <eos> ...``; of pairs,
prompt and answer tokens one after the other; of conversations, one after the other as the chat template writes them.
Beside each token file stands an index, int64 [documents, columns], with a row for each document: its first token's
place in the file, and relative to that for pairs the places of the answer's first token and of the beginning and end of
what may be cut from a prompt that is too long, for conversations that of the first answer. Conversations have a further
file, bool [tokens]: what the assistant writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raylm.data.sources.documents import Kind, Split
from raylm.data.sources.segments import MANIFEST
from raylm.errors import UserError

FORMAT_VERSION = 1
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "documents": ("start",),
    "pairs": ("start", "answer_start", "cut_start", "cut_end"),
    "conversations": ("start", "answer_start"),
}
# Of an entry in the manifest, the files beside the tokens.
BESIDE = ("index", "text", "counted")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises:
        UserError: the directory was not made, or not finished, by ``raylm prepare``.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} is not a prepared directory (no {MANIFEST}); make one, or finish it, with raylm prepare"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; prepare the data again") from None
    if not isinstance(manifest, dict) or manifest.get("version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a manifest of raylm prepare, version {FORMAT_VERSION}; prepare the data again")
    return manifest


def verify_prepared(directory: Path | str) -> dict[str, Any]:
    """Compare every file of a prepared directory with its checksum (about 1 s for a gigabyte); returns the manifest.

    Raises:
        UserError: a file is missing or differs; names it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for split in manifest["splits"].values():
        for entry in split["files"]:
            for part in (entry, *(entry[name] for name in BESIDE if name in entry)):
                path = directory / part["path"]
                if not path.is_file():
                    raise UserError(f"{path}: missing; prepare the data again")
                if file_hash(path) != part["sha256"]:
                    raise UserError(f"{path}: damaged shard: wrong checksum; prepare the data again")
    _verify_tokenizer(directory / "tokenizer")
    return manifest


def _verify_tokenizer(directory: Path) -> None:
    """Refuse a prepared set whose tokenizer, which training copies into the model, is not there or damaged."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: missing; prepare the data again") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged: {error}; prepare the data again") from None


class TokenShards:
    """One split's tokens, memory-mapped. Cheap to open and to send to another process.

    Args:
        directory: a prepared directory.
        split: train or validation.

    Attributes:
        token_count: tokens in the split, end-of-text tokens included.
        document_count: documents, pairs or conversations.
        byte_count: bytes of the documents' text in UTF-8, without what joins them.
        kind: documents, pairs or conversations.
        manifest: the whole manifest.
        eos_id, pad_id: ids of the tokenizer; pad_id is eos_id where it has none.

    Raises:
        UserError: the directory is not prepared, or a file is missing or has the wrong size.
    """

    def __init__(self, directory: Path | str, split: Split) -> None:
        self.directory, self.split = Path(directory), split
        self.manifest = read_manifest(directory)
        self.kind: Kind = self.manifest["kind"]
        self.eos_id: int = self.manifest["eos_id"]
        self.pad_id: int = self.manifest["pad_id"]
        self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        part = self.manifest["splits"][split]
        self.token_count: int = part["tokens"]
        self.document_count: int = part["documents"]
        self.byte_count: int = part["bytes"]
        self._files: list[dict[str, Any]] = part["files"]
        # _first[i] is the place in the stream of file i's first token; the last entry is the stream's length.
        self._first = np.cumsum([0, *(entry["tokens"] for entry in self._files)])
        for entry in self._files:
            self._check_size(entry)
        self._maps: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple:
        # Another process opens the files itself instead of receiving their content.
        return TokenShards, (self.directory, self.split)

    def _check_size(self, entry: dict[str, Any]) -> None:
        path = self.directory / entry["path"]
        expected = entry["tokens"] * self._dtype.itemsize
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path}: missing; prepare the data again") from None
        if size != expected:
            raise UserError(f"{path}: damaged shard: {size} bytes, {expected} in the manifest; prepare the data again")

    def _file(self, number: int) -> np.ndarray:
        path = self._files[number]["path"]
        if path not in self._maps:
            self._maps[path] = np.asarray(np.memmap(self.directory / path, dtype=self._dtype, mode="r"))
        return self._maps[path]

    def _counted_file(self, number: int) -> np.ndarray:
        path = self._files[number]["counted"]["path"]
        if path not in self._maps:
            try:
                self._maps[path] = np.load(self.directory / path, mmap_mode="r")
            except (OSError, ValueError, EOFError):
                raise UserError(f"{self.directory / path}: missing or damaged; prepare the data again") from None
        return self._maps[path]

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Tokens at ``positions`` of the stream: int64 of any shape to int64 of the same shape."""
        return self._at(positions, self._file, np.int64)

    def counted(self, positions: np.ndarray) -> np.ndarray:
        """Whether the assistant writes the tokens at ``positions`` of conversations: int64 to bool of the same
        shape."""
        return self._at(positions, self._counted_file, np.bool_)

    def _at(self, positions: np.ndarray, open_file: Callable[[int], np.ndarray], dtype: type) -> np.ndarray:
        flat = positions.ravel()
        numbers = np.searchsorted(self._first, flat, side="right") - 1
        found = np.empty(flat.shape, dtype=dtype)
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = open_file(int(number))[flat[here] - self._first[number]]
        return found.reshape(positions.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the stream, across files, int64 [stop - start]."""
        if not 0 <= start <= stop <= self.token_count:
            raise IndexError(f"tokens {start} to {stop} of {self.token_count}")
        parts = []
        for number in range(len(self._files)):
            first, last = int(self._first[number]), int(self._first[number + 1])
            if first < stop and start < last:
                parts.append(self._file(number)[max(start - first, 0) : stop - first])
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def index(self) -> np.ndarray:
        """The documents' index, int64 [documents, columns]; column 0 is the first token's place in the stream.

        Raises:
            UserError: an index file is missing or damaged.
        """
        columns = len(COLUMNS[self.kind])
        parts = [np.empty((0, columns), dtype=np.int64)]
        for number, entry in enumerate(self._files):
            path = self.directory / entry["index"]["path"]
            try:
                part = np.load(path)
            except (OSError, ValueError, EOFError):
                raise UserError(f"{path}: missing or damaged; prepare the data again") from None
            if part.shape != (entry["documents"], columns):
                raise UserError(f"{path}: damaged: shape {part.shape}; prepare the data again")
            part[:, 0] += self._first[number]
            parts.append(part)
        return np.concatenate(parts)

    def documents(self) -> Iterator[np.ndarray]:
        """Each document's tokens, int64, with the end-of-text token that ends it."""
        starts = self.index()[:, 0]
        for start, stop in zip(starts, [*starts[1:], self.token_count], strict=True):
            yield self.read(int(start), int(stop))
