"""A block to parts: its documents read, cleaned, given a side, and signed, in files of a bounded size.

The first of the two passes of ``prepare``. A part is ``work/parts/BBBBBB-PPP.parquet`` with its signatures beside it. A
block is done when ``work/blocks/BBBBBB.json``, its record, stands; what a block gives depends on the block alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raylm.config.data import DataSection
from raylm.config.run_directory import write_atomically
from raylm.data.cleaning.cleaner import Account, Cleaner
from raylm.data.cleaning.contamination import Contamination
from raylm.data.cleaning.signatures import Signatures
from raylm.data.sources.blocks import Block
from raylm.data.sources.corpus import BlockCount
from raylm.data.sources.documents import Document, DocumentFile, Kind, Split, hash_share, side_of
from raylm.data.sources.readers import read_block
from raylm.data.sources.streams import InputErrors

WORK = "work"
SAMPLE_PURPOSE = b"raylm-sample"
# What is kept of a document where it is asked for, or was there already.
EXTRA_COLUMNS = ("label", "augmentation")
# Documents by the power of two of their length in bytes.
LENGTH_BINS = 40
# What is cleaned in one go: bounds the memory that its words take.
BATCH_CHARACTERS = 1 << 19
BATCH_DOCUMENTS = 1024


class PartWriter:
    """Writes the parts of one block.

    Args:
        directory: the set's work directory.
        block: number of the block.
        part_bytes: text of a part.
        data: which signatures are wanted.
        sample_rate: share of the training documents that is kept for training a tokenizer; from 1 on, all are.
        columns: further attributes of documents to keep.
    """

    def __init__(
        self,
        directory: Path,
        block: int,
        part_bytes: int,
        data: DataSection,
        sample_rate: float,
        columns: tuple[str, ...] = (),
    ) -> None:
        self._columns = columns
        self._folder, self._block, self._part_bytes = directory / "parts", block, part_bytes
        self._deduplication, self._sample_rate = data.deduplication, sample_rate
        self._file: DocumentFile | None = None
        self.parts: list[dict[str, Any]] = []

    def write(self, document: Document, split: Split, kind: Kind, hashes: np.ndarray | None = None) -> None:
        """Append one document, its side decided; ``hashes`` are those of its words where they are known."""
        if self._file is None:
            name = f"{self._block:06d}-{len(self.parts):03d}"
            self._file = DocumentFile(self._folder / f"{name}.parquet", kind, True, self._columns)
            self._sample = DocumentFile(self._folder / f"{name}.sample.parquet", "documents")
            self._signatures = Signatures(self._deduplication) if self._deduplication else None
            self._unsigned: list[Document] = []
            self._hashes: list[np.ndarray | None] = []
            self._text_bytes = 0
            self._part = {"name": name, "train": 0, "validation": 0, "bytes": 0}
        self._file.write(document, split)
        self._part[split] += 1
        if split == "train" and self._sample_rate < 1 and hash_share(document.text, SAMPLE_PURPOSE) < self._sample_rate:
            # The row's number stands in for a title: duplicates are taken out by it.
            self._sample.write(Document(text=document.text, title=str(self._file.documents - 1)))
        if self._signatures is not None:
            self._unsigned.append(document)
            self._hashes.append(hashes)
            self._text_bytes += len(document.text)
            if self._text_bytes >= 1 << 20:
                self._sign()
        if self._file.bytes >= self._part_bytes:
            self.finish()

    def _sign(self) -> None:
        if self._signatures is not None and self._unsigned:
            self._signatures.add(self._unsigned, self._hashes)
        self._unsigned, self._hashes, self._text_bytes = [], [], 0

    def finish(self) -> None:
        """Close the part that is open."""
        if self._file is None:
            return
        self._sign()
        if self._signatures is not None:
            self._signatures.write(self._folder / self._part["name"])
        if self._sample_rate < 1:
            self._sample.__exit__(None, None, None)
        self._part["bytes"] = self._file.bytes
        self._file.__exit__(None, None, None)
        self.parts.append(self._part)
        self._file = None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in their order, as many as are cleaned in one go."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def make_parts(
    job: dict[str, Any], directory: str, data: dict[str, Any], source_names: list[str], part_bytes: int, rate: float
) -> dict[str, Any]:
    """The Ray Data task: reads one block, writes its parts, and returns its record.

    Args:
        job: a block as JSON.
        directory: the work directory.
        data: the ``data`` section.
        source_names: what the user called the sources.
        part_bytes: text of a part.
        rate: share of the documents that is sampled for the tokenizer.

    Raises:
        UserError: bad input.
    """
    block, section, work = Block.from_json(job), DataSection.model_validate(data), Path(directory)
    source = source_names[block.source]
    errors, account, count = InputErrors.of(section), Account(), BlockCount()
    cleaner = Cleaner(section.cleaning, account)
    contamination = Contamination.load(work, section.decontamination)
    lengths = np.zeros(LENGTH_BINS, dtype=np.int64)
    digest = hashlib.sha256()
    prepared = any(segment.format == "documents" for segment in block.segments)
    marked = section.fields.label is not None or section.augmentation is not None or prepared
    writer = PartWriter(work, block.number, part_bytes, section, rate, EXTRA_COLUMNS if marked else ())
    read = 0

    def drop(name: str, reason: str, document: Document) -> None:
        account.drop(name, reason, document.text)
        count.dropped += 1

    for documents in _batches(read_block(block, section, errors)):
        documents = [each for each in documents if block.sole_split is None or each.split in (None, block.sole_split)]
        read += len(documents)
        filled = [each for each in documents if each.text.strip()]
        count.empty += len(documents) - len(filled)
        for cleaned in cleaner.clean(filled):
            if cleaned is None:
                count.dropped += 1
                continue
            document = cleaned.document
            if not document.text.strip():
                drop("empty", "nothing left", document)
                continue
            if contamination is not None and contamination.found_in(document.text, cleaned.hashes):
                drop("decontamination", "text of an evaluation set", document)
                continue
            split = side_of(document, block.sole_split, section.validation_fraction)
            count.add(document, split, source)
            lengths[min(document.byte_count.bit_length(), LENGTH_BINS - 1)] += 1
            digest.update(f"{document.title}\0{document.text}\0".encode())
            writer.write(document, split, count.kind, cleaned.hashes)
    writer.finish()
    count.sha256 = digest.hexdigest()
    record = {"block": block.number, "read": read, "count": asdict(count), "parts": writer.parts}
    record |= {"cleaning": account.to_json(), "errors": {"counts": errors.counts, "samples": errors.samples}}
    record |= {"lengths": lengths.tolist()}
    write_atomically(work / "blocks" / f"{block.number:06d}.json", json.dumps(record, ensure_ascii=False))
    return record
