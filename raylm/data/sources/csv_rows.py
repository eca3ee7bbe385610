"""Rows of CSV files: what parts their columns, and where a row ends that is not as CSV has it.

A quote that is not closed would take all that follows into one row. Only the row with the quote is lost: reading goes
on at the line after it.
"""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Iterator

from raylm.config.data import FieldsSection
from raylm.data.sources.lines import Lines
from raylm.data.sources.rows import kind_of
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError

DELIMITERS = (",", ";", "\t", "|")
# Lines that are read again may be this many times those of the file; beyond that, all lines of a bad row are lost.
MOST_AGAIN, FREE_AGAIN = 4, 10_000


def find_delimiter(header: str, usual: str, fields: FieldsSection) -> str:
    """What parts the columns of a file: the first by which the header has the columns that ``fields`` names.

    Where none does, it is the one that gives most columns: the names that are found are what the user has to see.

    Args:
        header: the file's first line.
        usual: tried first.
        fields: names of the columns.
    """
    found = {delimiter: _cells(header, delimiter) for delimiter in (usual, *DELIMITERS)}
    for delimiter, names in found.items():
        if kind_of(names, fields) is not None and (fields.label is None or fields.label in names):
            return delimiter
    return max(found, key=lambda delimiter: len(found[delimiter]))


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.rstrip("\r\n") for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


class CsvRows:
    """(number of its first line in ``lines``, row) of every row below the header.

    Columns without a name, such as the index that pandas writes, are passed over.

    Args:
        lines: those of the file.
        errors: what to do with a bad row.
        delimiter: what parts the columns; None to find it in the header.
        usual: the delimiter that the file's suffix stands for.
        fields: names of the columns.
    """

    def __init__(
        self, lines: Lines, errors: InputErrors, delimiter: str | None, usual: str, fields: FieldsSection
    ) -> None:
        self._lines, self._errors, self._fields = lines, errors, fields
        self._delimiter, self._usual = delimiter, usual
        self._source = iter(lines)
        self._again: deque[tuple[int, str]] = deque()
        self._count_again = 0
        # The lines of the row that is being read.
        self._row: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """See the class."""
        # A document may be longer than the csv module's default of 128 KiB a field.
        csv.field_size_limit(sys.maxsize)
        header = self._header()
        named = [(place, name) for place, name in enumerate(header) if name]
        for number, cells in self._records():
            if len(cells) == len(header):
                yield number, {name: cells[place] for place, name in named}
            elif cells:
                self._lose(f"found {len(cells)} fields, the header has {len(header)}")

    def _header(self) -> list[str]:
        first = next(self._feed(), "")
        while first and not first.strip():
            first = next(self._feed(), "")
        self._again.extendleft(self._row[-1:] if first else [])
        self._row = []
        if self._delimiter is None:
            self._delimiter = find_delimiter(first, self._usual, self._fields)
        for _, header in self._records(strict=True):
            repeated = next((name for name in header if name and header.count(name) > 1), None)
            if repeated is not None:
                raise UserError(f"{self._lines.place(self._row[0][0])}: column '{repeated}' is twice in the header")
            return header
        return []

    def _feed(self) -> Iterator[str]:
        """Lines, those first that are to be read again."""
        size = 0
        while True:
            if self._again:
                number, text = self._again.popleft()
            else:
                found = next(self._source, None)
                if found is None:
                    return
                number, text = self._lines.count, found[1]
            size = size + len(text) if self._row else len(text)
            self._row.append((number, text))
            if size > self._lines.most_bytes:
                raise csv.Error(f"a row of more than data.max_document_bytes ({self._lines.most_bytes})")
            yield text

    def _records(self, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
        """(number of the first line, cells); with ``strict``, a bad one is an error whatever ``data.errors`` says."""
        reader = csv.reader(self._feed(), delimiter=self._delimiter or self._usual, strict=True)
        while True:
            self._row = []
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if strict:
                    raise UserError(self._message(f"malformed CSV: {error}")) from None
                self._lose(f"malformed CSV: {error}")
                reader = csv.reader(self._feed(), delimiter=self._delimiter or self._usual, strict=True)
                continue
            if cells is None:
                return
            yield self._row[0][0], cells

    def _message(self, what: str) -> str:
        first, last = self._row[0][0], self._row[-1][0]
        if last > first:
            end = self._lines.place(last).rpartition(":")[2]
            what += f" (a quote that opens here goes on to line {end}; is its end missing?)"
        return f"{self._lines.place(first)}: {what}"

    def _lose(self, what: str) -> None:
        """Leave out the first line of a bad row and read the others again; all of them where that is too many."""
        self._errors.bad("malformed", self._message(what))
        rest, self._row = self._row[1:], []
        self._count_again += len(rest)
        if self._count_again <= MOST_AGAIN * self._lines.count + FREE_AGAIN:
            self._again.extendleft(reversed(rest))
            return
        for number, _ in rest:
            self._errors.bad("malformed", f"{self._lines.place(number)}: in a malformed row that begins before it")
