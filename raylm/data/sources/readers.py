"""Readers of one segment each: text, JSONL, CSV, Parquet, SQuAD and parallel text to documents, streaming.

Every mistake is named by its place, and ``data.errors`` decides whether it ends the reading. Empty texts are passed on
(they are counted and dropped later); nothing else is lost silently.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.config.data import DataSection
from raylm.data.sources.blocks import Block, Segment
from raylm.data.sources.documents import Document, read_row_groups
from raylm.data.sources.rows import Rows, is_wanted, rows_to_documents
from raylm.data.sources.squad import read_articles
from raylm.data.sources.streams import (
    BYTE_ORDER_MARK,
    InputErrors,
    Lines,
    damaged,
    file_system,
    is_remote,
    line_number,
    open_bytes,
    open_remote,
    plain_suffix,
)
from raylm.errors import UserError, first_line

PARQUET_ROWS = 1024


def read_block(block: Block, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """The documents of a block, in order.

    Raises:
        UserError: bad input; names the file and the place.
    """
    for segment in block.segments:
        try:
            yield from READERS[segment.format](segment, data, errors)
        except UserError:
            raise
        except damaged() as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{segment.path}: cannot be read: {reason}") from None


def read_text(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of a UTF-8 text file: the whole file, its paragraphs or its lines (``data.text_unit``)."""
    if data.text_unit == "file":
        with open_bytes(segment.path) as stream:
            raw = stream.read(data.max_document_bytes + 1)
        if len(raw) > data.max_document_bytes:
            errors.bad(
                "too long",
                f"{segment.path}: one document of more than data.max_document_bytes ({data.max_document_bytes}); "
                "allowed: a larger limit, or data.text_unit: paragraph or line",
            )
            return
        content = raw.removeprefix(BYTE_ORDER_MARK)
        text = errors.decode(content, segment.path, len(raw) - len(content))
        if text is not None:
            yield Document(text=text)
        return
    lines = _lines(segment, data, errors)
    if data.text_unit == "line":
        for _, line in lines:
            yield Document(text=line.rstrip("\r\n"))
    else:
        yield from _paragraphs(segment, lines)


def _paragraphs(segment: Segment, lines: Lines) -> Iterator[Document]:
    """Paragraphs of a range: from its first blank line on (the file's first range: from the beginning) to the first
    blank line of the next range, which is a line that begins after ``stop``."""
    paragraph: list[str] = []
    waiting = segment.start > 0
    for offset, line in lines.read(lambda _: True):
        if not line.strip():
            waiting = False
            if paragraph:
                yield Document(text="".join(paragraph).rstrip("\r\n"))
                paragraph = []
            if segment.stop is not None and offset > segment.stop:
                return
        elif not waiting:
            paragraph.append(line)
    if paragraph:
        yield Document(text="".join(paragraph).rstrip("\r\n"))


def read_jsonl(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of a file with one JSON object a line; blank lines are passed over."""
    path = segment.path

    def rows(lines: Iterable[tuple[int, str]]) -> Rows:
        for offset, line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = getattr(error, "msg", str(error))
                place = f"{path}:{line_number(path, offset)}"
                errors.bad("malformed", f"{place}: malformed JSON: {reason}; allowed: one object a line")
                continue
            if not isinstance(row, dict):
                place = f"{path}:{line_number(path, offset)}"
                errors.bad("malformed", f"{place}: found a JSON {type(row).__name__}, allowed: one object a line")
                continue
            yield offset, row

    def head() -> list[str] | None:
        # What a row is, the file's first one says.
        if segment.start == 0:
            return None
        first = next(rows_of_head(path, data, InputErrors("skip", encoding=data.encoding), rows), None)
        return None if first is None else list(first[1])

    place = lambda offset: f"{path}:{line_number(path, offset)}"  # noqa: E731
    yield from rows_to_documents(rows(_lines(segment, data, errors)), data.fields, path, errors, place, head)


def rows_of_head(path: str, data: DataSection, errors: InputErrors, rows: Callable[..., Rows]) -> Rows:
    """The rows from the file's beginning on."""
    return rows(Lines(path, errors, data.max_document_bytes))


def read_csv(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of a CSV file with a header (``.tsv``: separated by tabs); quoted fields may span lines."""
    path = segment.path

    def rows() -> Rows:
        # A document may be longer than the csv module's default of 128 KiB a field.
        csv.field_size_limit(sys.maxsize)
        delimiter = "\t" if plain_suffix(path) == ".tsv" else ","
        reader = csv.reader((line for _, line in _lines(segment, data, errors)), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                errors.bad("malformed", f"{path}:{reader.line_num}: malformed CSV: {error}")
                continue
            if fields is None:
                return
            if header is None:
                header = fields
                repeated = next((name for name in header if header.count(name) > 1), None)
                if repeated is not None:
                    raise UserError(f"{path}:1: column '{repeated}' is twice in the header")
            elif not fields:
                continue
            elif len(fields) != len(header):
                found = f"found {len(fields)} fields, the header has {len(header)}"
                errors.bad("malformed", f"{path}:{reader.line_num}: {found}")
            else:
                yield reader.line_num, dict(zip(header, fields, strict=True))

    return rows_to_documents(rows(), data.fields, path, errors, lambda line: f"{path}:{line}")


def read_parquet(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of a Parquet file, a batch of rows at a time."""
    path = segment.path

    def rows() -> Rows:
        try:
            files, inner = file_system(path) if is_remote(path) else (None, path)
            with pq.ParquetFile(open_remote(files, inner) if files else inner) as file:
                names = list(file.schema_arrow.names)
                columns = [name for name in names if is_wanted(name, data.fields)] or None
                groups = range(segment.start, segment.stop or file.num_row_groups)
                number = sum(file.metadata.row_group(group).num_rows for group in range(segment.start))
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(groups), columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row if columns else dict.fromkeys(names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from None

    return rows_to_documents(rows(), data.fields, path, errors, lambda number: f"{path}: row {number}")


def read_squad(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Pairs of a file in the SQuAD format (Rajpurkar et al. 2016), nested or a flat list: question, first answer, and
    the paragraph as context where ``fields.context`` is given. Questions without an answer are empty documents."""
    path = segment.path
    articles = read_articles(path, errors, "SQuAD, or one object a line in .jsonl")

    def rows() -> Rows:
        for number, article in enumerate(articles):
            paragraphs = article.get("paragraphs", [article]) if isinstance(article, dict) else [article]
            for paragraph in paragraphs:
                try:
                    context = paragraph.get("context") or paragraph["context_text"]
                    for question in paragraph["qas"]:
                        yield number, {"question": _question(question), "context": context, "answer": _answer(question)}
                except (KeyError, TypeError, AttributeError) as error:
                    found = f"found {error}" if isinstance(error, KeyError) else "found another structure"
                    errors.bad("malformed", f"{path}: article {number}: not a SQuAD paragraph: {found}")

    fields = data.fields.model_copy(
        update={"prompt": "question", "answer": "answer", "context": "context" if data.fields.context else None}
    )
    yield from rows_to_documents(rows(), fields, path, errors, lambda number: f"{path}: article {number}")


def _question(question: Mapping[str, Any]) -> str:
    return question["question"] if "question" in question else question["query_text"]


def _answer(question: Mapping[str, Any]) -> str:
    answers = question["answers"]
    if not answers:
        return ""
    return answers[0]["text"] if isinstance(answers[0], dict) else answers[0]


def read_parallel(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Pairs of two text files of which line n of the second translates line n of the first; without a target, of one
    with both on a line and a tab between. Further columns are passed over, as some collections name sources there."""
    if segment.target is None:
        return read_columns(segment, data, errors)
    path, target = segment.path, str(segment.target)

    def rows() -> Rows:
        # A line that is skipped on one side only would shift the rest: bad bytes are replaced, never skipped.
        policy = InputErrors("strict" if errors.policy == "strict" else "replace", encoding=data.encoding)
        sides = (iter(Lines(name, policy, data.max_document_bytes)) for name in (path, target))
        for number, (left, right) in enumerate(itertools.zip_longest(*sides), start=1):
            if left is None or right is None:
                shorter = path if left is None else target
                raise UserError(f"{shorter}: ends after line {number - 1}; allowed: as many lines as in the other file")
            yield number, {data.fields.prompt: left[1].rstrip("\r\n"), data.fields.answer: right[1].rstrip("\r\n")}
        for kind, count in policy.counts.items():
            errors.counts[kind] = errors.counts.get(kind, 0) + count

    fields = data.fields.model_copy(update={"context": None, "label": None})
    return rows_to_documents(rows(), fields, path, errors, lambda number: f"{path}:{number}")


def read_columns(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Pairs of a text file with a prompt, a tab and an answer on each line."""
    path = segment.path

    def rows() -> Rows:
        for offset, line in _lines(segment, data, errors):
            columns = line.rstrip("\r\n").split("\t")
            if len(columns) > 1:
                yield offset, {data.fields.prompt: columns[0], data.fields.answer: columns[1]}
            elif line.strip():
                place = f"{path}:{line_number(path, offset)}"
                errors.bad("malformed", f"{place}: found no tab, allowed: a text, a tab and its translation")

    fields = data.fields.model_copy(update={"context": None, "label": None})
    place = lambda offset: f"{path}:{line_number(path, offset)}"  # noqa: E731
    return rows_to_documents(rows(), fields, path, errors, place)


def read_stdlib(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of an embedded corpus."""
    from raylm.config.data import STDLIB_PAIRS
    from raylm.data.sources.stdlib import stdlib_documents, stdlib_pairs

    documents = stdlib_documents()
    if segment.path == STDLIB_PAIRS:
        documents = stdlib_pairs(documents, with_context=data.fields.context is not None)
    yield from documents


def read_prepared(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Documents of one file of a prepared directory, each on the side where it was."""
    split = Path(segment.path).name.partition("-")[0]
    for group in read_row_groups(Path(segment.path)):
        for document in group:
            yield document.on_side(split)


def read_hub(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[Document]:
    """Rows of a hub dataset."""
    from raylm.data.sources.hub import hub_rows

    place = lambda number: f"{segment.path}: row {number}"  # noqa: E731
    return rows_to_documents(hub_rows(segment, data), data.fields, segment.path, errors, place)


def _lines(segment: Segment, data: DataSection, errors: InputErrors) -> Lines:
    return Lines(segment.path, errors, data.max_document_bytes, segment.start, segment.stop)


READERS: dict[str, Callable[[Segment, DataSection, InputErrors], Iterator[Document]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "squad": read_squad,
    "parallel": read_parallel,
    "stdlib": read_stdlib,
    "documents": read_prepared,
    "hub": read_hub,
}
