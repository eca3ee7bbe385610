"""The whole input of ``prepare``: its sources, the side of every document, and the survey that checks all of it.

In: the ``data`` section. Out: documents with their side, in a fixed order, twice: once to be checked and counted
(nothing is written before all input was found good), once to be written.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raylm.config.data import STDLIB_DOCS, STDLIB_PAIRS, DataSection
from raylm.data.documents import Document, Kind, Split, split_of
from raylm.data.sources import Source, open_sources
from raylm.errors import UserError


@dataclass
class Survey:
    """What a pass over the whole input found.

    Attributes:
        kind: documents or pairs.
        documents, bytes: by split; bytes of text in UTF-8.
        sources: a record a source, for the manifest: name, documents, empty ones left out, bytes, content hash, and of
            an embedded corpus the Python version.
    """

    kind: Kind
    documents: dict[Split, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    bytes: dict[Split, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    sources: list[dict[str, Any]] = field(default_factory=list)


class Corpus:
    """The documents that the ``data`` section names.

    Raises:
        UserError: a source does not exist.
    """

    def __init__(self, data: DataSection) -> None:
        self._data = data
        self._train = open_sources(data, data.train_sources, "data.train")
        self._validation = open_sources(data, data.validation_sources, "data.validation")

    def documents(self) -> Iterator[tuple[Split, Document]]:
        """Every document that is not empty, with its side, in the order of the sources.

        Raises:
            UserError: bad input; names the file and the place.
        """
        for source, sole_split in self._parts():
            for document in source.documents():
                split = self._side(document, sole_split)
                if split is not None and document.text.strip():
                    yield split, document

    def _parts(self) -> Iterator[tuple[Source, Split | None]]:
        """Each source, with the one side that it gives to where there is a validation source."""
        for source in self._train:
            yield source, "train" if self._validation else None
        for source in self._validation:
            yield source, "validation"

    def _side(self, document: Document, sole_split: Split | None) -> Split | None:
        """The document's side; None where its prepared source holds it for the other one."""
        if sole_split is None:
            return split_of(document, self._data.validation_fraction)
        return sole_split if document.split in (None, sole_split) else None

    def survey(self) -> Survey:
        """Read everything once, check it and count it.

        Raises:
            UserError: bad input, pairs mixed with documents, or a split without a document.
        """
        survey: Survey | None = None
        first_source = ""
        for source, sole_split in self._parts():
            record: dict[str, Any] = {"source": source.name, "documents": 0, "empty": 0, "bytes": 0}
            if source.name in (STDLIB_DOCS, STDLIB_PAIRS):
                record["python"] = platform.python_version()
            digest = hashlib.sha256()
            for document in source.documents():
                split = self._side(document, sole_split)
                if split is None:
                    continue
                if not document.text.strip():
                    record["empty"] += 1
                    continue
                kind: Kind = "pairs" if document.prompt else "documents"
                if survey is None:
                    survey, first_source = Survey(kind), source.name
                elif kind != survey.kind:
                    raise UserError(
                        f"data: found {kind} in {source.name} beside {survey.kind} in {first_source}; allowed: one kind"
                    )
                size = document.byte_count
                record["documents"] += 1
                record["bytes"] += size
                survey.documents[split] += 1
                survey.bytes[split] += size
                digest.update(f"{document.title}\0{document.text}\0".encode())
            record["sha256"] = digest.hexdigest()
            if survey is not None:
                survey.sources.append(record)
            self._check_not_empty(record, sole_split)
        if survey is None:
            raise UserError(f"data.train: {', '.join(self._data.train_sources)}: no document that is not empty")
        self._check_splits(survey)
        return survey

    def _check_not_empty(self, record: dict[str, Any], sole_split: Split | None) -> None:
        if not record["documents"]:
            key = "data.validation" if sole_split == "validation" else "data.train"
            empty = f" ({record['empty']} empty ones)" if record["empty"] else ""
            raise UserError(f"{key}: {record['source']}: no document that is not empty{empty}")

    def _check_splits(self, survey: Survey) -> None:
        train, validation = survey.documents["train"], survey.documents["validation"]
        fraction = self._data.validation_fraction
        wanted = bool(self._validation) or fraction > 0
        if train and (validation or not wanted):
            return
        empty = "training" if not train else "validation"
        raise UserError(
            f"data.validation_fraction: {fraction} of {train + validation} documents leaves none for {empty}; allowed: "
            "another fraction, more documents (data.text_unit: paragraph or line), or a data.validation source"
        )
