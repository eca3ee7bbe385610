"""Rows of JSON, JSONL, CSV and Parquet files and of hub datasets, as tables that documents and examples are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylm.config.data import DataSection
from raylm.data.sources.blocks import Segment
from raylm.data.sources.csv_rows import CsvRows
from raylm.data.sources.lines import Lines
from raylm.data.sources.rows import Rows, Table, wanted_columns
from raylm.data.sources.squad import article_rows, is_article
from raylm.data.sources.streams import (
    BYTE_ORDER_MARK,
    InputErrors,
    file_system,
    is_remote,
    open_remote,
    plain_suffix,
    readable,
)
from raylm.errors import UserError, first_line

PARQUET_ROWS = 1024


def open_table(segment: Segment, data: DataSection, errors: InputErrors) -> Table:
    """The rows of a segment of one of the formats in ``TABLES``.

    Raises:
        UserError: when its rows are read: bad input; names the file and the place.
    """
    table = TABLES[segment.format](segment, data, errors)

    def rows() -> Rows:
        with readable(segment.path):
            yield from table.rows

    return Table(table.origin, rows(), table.place, table.first_columns)


def jsonl_table(segment: Segment, data: DataSection, errors: InputErrors) -> Table:
    """Of a file with one JSON object a line; blank lines are passed over."""
    lines = Lines.of(segment, data, errors)

    def head() -> list[str] | None:
        # What a row is, the file's first one says.
        beginning = Lines(segment.path, InputErrors("skip", encoding=data.encoding), data.max_document_bytes)
        first = next(_objects(beginning, InputErrors("skip")), None)
        return None if first is None else list(first[1])

    return Table(segment.path, _objects(lines, errors), lines.place, head if segment.start else None)


def _objects(lines: Lines, errors: InputErrors) -> Rows:
    for _, line in lines:
        if not line.strip():
            continue
        number = lines.count
        try:
            row = _parsed(line)
        except ValueError as error:
            reason = getattr(error, "msg", str(error))
            errors.bad("malformed", f"{lines.place(number)}: malformed JSON: {reason}; allowed: one object a line")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            found = f"found a JSON {type(row).__name__}, allowed: one object a line"
            errors.bad("malformed", f"{lines.place(number)}: {found}")


def _parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_table(segment: Segment, data: DataSection, errors: InputErrors) -> Table:
    """Of a JSON file: a list of rows, or the articles of SQuAD, nested or a flat list of paragraphs."""
    path = segment.path
    items = _items(path, errors)
    if any(is_article(item) for item in items) or (items and not any(isinstance(item, dict) for item in items)):
        return Table(path, article_rows(path, items, errors), lambda number: f"{path}: article {number}")

    def rows() -> Rows:
        for number, row in enumerate(items, start=1):
            if isinstance(row, dict):
                yield number, row
            else:
                found = f"found a JSON {type(row).__name__}, allowed: objects"
                errors.bad("malformed", f"{path}: row {number}: {found}")

    return Table(path, rows(), lambda number: f"{path}: row {number}")


def _items(path: str, errors: InputErrors) -> list[Any]:
    """The list that a file is, or has as ``data``; none where the file was skipped as undecodable.

    Raises:
        UserError: it is no JSON, or another value.
    """
    with readable(path), errors.open(path) as stream:
        text = errors.decode(stream.read().removeprefix(BYTE_ORDER_MARK), path, 0)
    if text is None:
        return []
    try:
        content = _parsed(text)
    except ValueError as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        hint = "; one object a line is data.format: jsonl" if reason == "Extra data" else ""
        raise UserError(f"{path}:{line}: malformed JSON: {reason}{hint}") from None
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise UserError(
            f"{path}: not a SQuAD file: found no list 'data'; allowed: SQuAD, a list of rows, or one object a line in "
            ".jsonl"
        )
    return items


def csv_table(segment: Segment, data: DataSection, errors: InputErrors) -> Table:
    """Of a CSV file with a header; quoted fields may span lines."""
    lines = Lines.of(segment, data, errors)
    usual = "\t" if plain_suffix(segment.path) == ".tsv" else ","
    return Table(segment.path, iter(CsvRows(lines, errors, data.delimiter, usual, data.fields)), lines.place)


def parquet_table(segment: Segment, data: DataSection, errors: InputErrors) -> Table:
    """Of a Parquet file, read a batch at a time."""
    path = segment.path

    def rows() -> Rows:
        try:
            files, inner = file_system(path) if is_remote(path) else (None, path)
            with pq.ParquetFile(open_remote(files, inner) if files else inner) as file:
                names = list(file.schema_arrow.names)
                columns = wanted_columns(names, data.fields) or None
                groups = range(segment.start, segment.stop or file.num_row_groups)
                number = sum(file.metadata.row_group(group).num_rows for group in range(segment.start))
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(groups), columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row if columns else dict.fromkeys(names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from None

    return Table(path, rows(), lambda number: f"{path}: row {number}")


def hub_table(segment: Segment, data: DataSection, errors: InputErrors) -> Table:
    """Of a hub dataset."""
    from raylm.data.sources.hub import hub_rows

    return Table(segment.path, hub_rows(segment, data), lambda number: f"{segment.path}: row {number}")


TABLES: dict[str, Callable[[Segment, DataSection, InputErrors], Table]] = {
    "jsonl": jsonl_table,
    "json": json_table,
    "squad": json_table,
    "csv": csv_table,
    "parquet": parquet_table,
    "hub": hub_table,
}
