"""The whole input of ``prepare``: its sources, the blocks that they are cut into, and what was found in them.

In: the ``data`` section. Out: blocks in a fixed order. Opening lists the files; :meth:`Corpus.survey` reads it all
on this machine, for a stage that wants everything checked before it writes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from raylm.config.data import STDLIB_DOCS, STDLIB_PAIRS, DataSection
from raylm.data.sources.blocks import Block, Segment, block_bytes, cut
from raylm.data.sources.documents import Document, Kind, Split, side_of
from raylm.data.sources.readers import read_block
from raylm.data.sources.segments import Source, open_sources
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError


@dataclass
class Survey:
    """What a pass over the whole input found.

    Attributes:
        kind: documents, pairs or conversations.
        documents, bytes: by split; bytes of text in UTF-8.
        sources: a record a source, for the manifest: name, documents, empty ones left out, dropped ones, bytes, content
            hash, and of an embedded corpus the Python version.
    """

    kind: Kind
    documents: dict[Split, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    bytes: dict[Split, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    sources: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class BlockCount:
    """What was found in one block.

    Attributes:
        kind: documents, pairs or conversations; None where nothing was found.
        documents, bytes: by split.
        empty: documents without a character that is no white space.
        dropped: documents that cleaning dropped.
        sha256: of what was found.
    """

    kind: Kind | None = None
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    empty: int = 0
    dropped: int = 0
    sha256: str = ""

    def add(self, document: Document, split: Split, source: str) -> None:
        """Count a document.

        Raises:
            UserError: it is of another kind than those before.
        """
        kind = document.kind
        if self.kind is None:
            self.kind = kind
        elif kind != self.kind:
            raise UserError(_mixed(kind, source, self.kind, source))
        self.documents[split] += 1
        self.bytes[split] += document.byte_count


def _mixed(kind: str, source: str, first: str, first_source: str) -> str:
    return f"data: found {kind} in {source} beside {first} in {first_source}; allowed: one kind"


def source_documents(source: Source, data: DataSection) -> Iterator[Document]:
    """All documents of one source, empty ones included, as they are before cleaning.

    Raises:
        UserError: bad input; names the file and the place.
    """
    return read_block(Block(0, 0, None, source.segments), data, InputErrors.of(data))


class Corpus:
    """The documents that the ``data`` section names.

    Attributes:
        sources: those of ``data.train``, then those of ``data.validation``.
        blocks: what they are cut into.
        block_bytes: about the size of a block, in the file.

    Raises:
        UserError: a source does not exist.
    """

    def __init__(self, data: DataSection) -> None:
        self._data = data
        train = open_sources(data, data.train_sections, "data.train")
        validation = open_sources(data, data.validation_sources, "data.validation")
        self.sources: list[Source] = [*train, *validation]
        self._first_validation = len(train)
        total = sum(segment.size for source in self.sources for segment in source.segments)
        self.block_bytes = block_bytes(total)
        self.bytes = total
        self.blocks: list[Block] = []
        for number, source in enumerate(self.sources):
            sole: Split | None = "validation" if number >= len(train) else "train" if validation else None
            for segments in cut(map(self._uncut, source.segments), self.block_bytes):
                self.blocks.append(Block(len(self.blocks), number, sole, segments))

    def _uncut(self, segment: Segment) -> Segment:
        """A file that is one document is read in one piece."""
        is_document = segment.format == "text" and self._data.text_unit == "file"
        return replace(segment, stop=None) if is_document else segment

    def key(self, source: int) -> str:
        """The key that names a source: data.train or data.validation."""
        return "data.train" if source < self._first_validation else "data.validation"

    def identity(self) -> str:
        """Hash of what is read: the files with their sizes and times, and how they are cut."""
        blocks = [block.to_json() for block in self.blocks]
        return hashlib.sha256(json.dumps([blocks, platform.python_version()], sort_keys=True).encode()).hexdigest()

    def documents(self) -> Iterator[tuple[Split, Document]]:
        """Every document that is not empty, with its side, in the order of the sources, as it is before cleaning.

        Raises:
            UserError: bad input; names the file and the place.
        """
        for block in self.blocks:
            for document in read_block(block, self._data, InputErrors.of(self._data)):
                split = side_of(document, block.sole_split, self._data.validation_fraction)
                if split is not None and document.text.strip():
                    yield split, document

    def survey(self) -> Survey:
        """Read everything once, check it and count it.

        Raises:
            UserError: bad input, kinds that are mixed, or a split without a document.
        """
        return self.summarize(self._count(block) for block in self.blocks)

    def _count(self, block: Block) -> BlockCount:
        count = BlockCount()
        for document in read_block(block, self._data, InputErrors.of(self._data)):
            split = side_of(document, block.sole_split, self._data.validation_fraction)
            if split is None:
                continue
            if document.text.strip():
                count.add(document, split, self.sources[block.source].name)
            else:
                count.empty += 1
        return count

    def summarize(self, counts: Iterable[BlockCount]) -> Survey:
        """Add up the counts of all blocks, in their order.

        Raises:
            UserError: kinds that are mixed, a source or a split without a document.
        """
        survey: Survey | None = None
        first_source = ""
        records: list[dict[str, Any]] = []
        for source in self.sources:
            records.append({"source": source.name, "documents": 0, "empty": 0, "dropped": 0, "bytes": 0})
            if source.name in (STDLIB_DOCS, STDLIB_PAIRS):
                records[-1]["python"] = platform.python_version()
            if source.weight != 1:
                records[-1]["weight"] = source.weight
        digests = [hashlib.sha256() for _ in self.sources]
        for block, count in zip(self.blocks, counts, strict=True):
            record, name = records[block.source], self.sources[block.source].name
            record["documents"] += sum(count.documents.values())
            record["bytes"] += sum(count.bytes.values())
            record["empty"] += count.empty
            record["dropped"] += count.dropped
            digests[block.source].update(count.sha256.encode())
            if count.kind is None:
                continue
            if survey is None:
                survey, first_source = Survey(count.kind), name
            elif {count.kind, survey.kind} == {"pairs", "conversations"}:
                # A pair is a conversation of two messages.
                survey.kind = "conversations"
            elif count.kind != survey.kind:
                raise UserError(_mixed(count.kind, name, survey.kind, first_source))
            for split in ("train", "validation"):
                survey.documents[split] += count.documents[split]
                survey.bytes[split] += count.bytes[split]
        for number, record in enumerate(records):
            record["sha256"] = digests[number].hexdigest()
            self._check_not_empty(record, self.key(number))
        assert survey is not None
        survey.sources = records
        self._check_splits(survey.documents)
        return survey

    @staticmethod
    def _check_not_empty(record: dict[str, Any], key: str) -> None:
        if not record["documents"]:
            left_out = [f"{record['empty']} empty ones"] if record["empty"] else []
            left_out += [f"cleaning dropped {record['dropped']}"] if record["dropped"] else []
            why = f" ({', '.join(left_out)})" if left_out else ""
            raise UserError(f"{key}: {record['source']}: no document that is not empty{why}")

    def _check_splits(self, documents: dict[Split, int]) -> None:
        train, validation = documents["train"], documents["validation"]
        fraction = self._data.validation_fraction
        wanted = bool(self._data.validation_sources) or fraction > 0
        if train and (validation or not wanted):
            return
        empty = "training" if not train else "validation"
        raise UserError(
            f"data.validation_fraction: {fraction} of {train + validation} documents leaves none for {empty}; allowed: "
            "another fraction, more documents (data.text_unit: paragraph or line), or a data.validation source"
        )
