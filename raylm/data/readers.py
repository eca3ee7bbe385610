"""Readers of one file each: text, JSONL, CSV and Parquet to documents, streaming, every mistake named by its place.

A row with the prompt and the answer column is a pair; otherwise the text column is a document. Empty texts are passed
on (the survey counts and drops them); nothing else is lost silently.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.config.data import DataSection, FieldsSection
from raylm.data.documents import Document, make_pair
from raylm.errors import UserError

Rows = Iterator[tuple[str, Mapping[str, Any]]]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_text(path: Path, data: DataSection) -> Iterator[Document]:
    """Documents of a UTF-8 text file: the whole file, its paragraphs or its lines (``data.text_unit``)."""
    if data.text_unit == "file":
        raw = path.read_bytes()
        content = raw.removeprefix(BYTE_ORDER_MARK)
        yield Document(text=_decode(content, path, len(raw) - len(content)))
        return
    paragraph: list[str] = []
    for _, line in _lines(path):
        if data.text_unit == "line":
            yield Document(text=line.rstrip("\r\n"))
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield Document(text="".join(paragraph).rstrip("\r\n"))
            paragraph = []
    if paragraph:
        yield Document(text="".join(paragraph).rstrip("\r\n"))


def read_jsonl(path: Path, data: DataSection) -> Iterator[Document]:
    """Documents of a file with one JSON object a line; blank lines are passed over."""

    def rows() -> Rows:
        for number, line in _lines(path):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = getattr(error, "msg", str(error))
                raise UserError(f"{path}:{number}: malformed JSON: {reason}; allowed: one object a line") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: found a JSON {type(row).__name__}, allowed: one object a line")
            yield f"{path}:{number}", row

    return rows_to_documents(rows(), data.fields, str(path))


def read_csv(path: Path, data: DataSection) -> Iterator[Document]:
    """Documents of a CSV file with a header (``.tsv``: separated by tabs); quoted fields may span lines."""

    def rows() -> Rows:
        # A document may be longer than the csv module's default of 128 KiB a field.
        csv.field_size_limit(sys.maxsize)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            repeated = next((name for name in header if header.count(name) > 1), None)
            if repeated is not None:
                raise UserError(f"{path}:1: column '{repeated}' stands twice in the header")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{path}:{reader.line_num}: found {len(fields)} fields, the header has {len(header)}"
                    )
                yield f"{path}:{reader.line_num}", dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: malformed CSV: {error}") from None

    return rows_to_documents(rows(), data.fields, str(path))


def read_parquet(path: Path, data: DataSection) -> Iterator[Document]:
    """Documents of a Parquet file, a batch of rows at a time."""

    def rows() -> Rows:
        try:
            with pq.ParquetFile(path) as file:
                present = list(file.schema_arrow.names)
                columns = [name for name in _wanted(data.fields) if name in present] or None
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}: row {number}", row
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None

    return rows_to_documents(rows(), data.fields, str(path))


READERS: dict[str, Callable[[Path, DataSection], Iterator[Document]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}
SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def rows_to_documents(rows: Rows, fields: FieldsSection, origin: str) -> Iterator[Document]:
    """Documents or pairs of (place, row); the first row's columns decide which.

    Raises:
        UserError: a column is missing, or a value is no text; names the place, the column and the columns found.
    """
    first = next(rows, None)
    if first is None:
        return
    columns = list(first[1])
    is_pairs = fields.prompt in columns and fields.answer in columns
    if "text" in fields.model_fields_set and fields.text in columns:
        is_pairs = False
    if not is_pairs and fields.text not in columns:
        raise UserError(
            f"{origin}: no column '{fields.text}' (nor both '{fields.prompt}' and '{fields.answer}'); columns found: "
            f"{', '.join(columns) or 'none'}; name yours in data.fields"
        )
    for place, row in itertools.chain([first], rows):
        if is_pairs:
            prompt, answer = _value(row, fields.prompt, place), _value(row, fields.answer, place)
            context = _value(row, fields.context, place) if fields.context else ""
            complete = prompt.strip() and answer.strip()
            yield make_pair(prompt, answer, context) if complete else Document(text="")
        else:
            yield Document(text=_value(row, fields.text, place))


def _wanted(fields: FieldsSection) -> list[str]:
    return [name for name in (fields.text, fields.prompt, fields.answer, fields.context) if name]


def _value(row: Mapping[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise UserError(f"{place}: no column '{column}'; columns found: {', '.join(row) or 'none'}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: column '{column}': found {type(value).__name__}, allowed: text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        raise UserError(f"{place}: column '{column}': not valid Unicode at character {error.start}") from None
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, decoded line with its end) of a UTF-8 file."""
    offset = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            content = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            yield number, _decode(content, path, offset + len(raw) - len(content))
            offset += len(raw)


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        place, found = offset + error.start, content[error.start]
        raise UserError(f"{path}: not UTF-8 at byte {place}: found 0x{found:02x}, allowed: UTF-8 text") from None
