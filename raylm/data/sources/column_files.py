"""Column files (CoNLL): a word and what is said of it on each line, sentences parted by blank lines.

In: a segment. Out: :class:`ColumnSentence`. Columns are parted by tabs where a line has any, else by white space. Lines
``-DOCSTART-`` part documents and are passed over (CoNLL-2003), and so are comments and what is no word of its own in
CoNLL-U (ranges ``1-2``, empty nodes ``1.1``; https://universaldependencies.org/format.html). A line ``# global.columns
= ...`` names the columns (CoNLL-U Plus).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from raylm.config.data import DataSection, FieldsSection
from raylm.data.sources.blocks import Segment
from raylm.data.sources.lines import Lines
from raylm.data.sources.streams import InputErrors, readable
from raylm.errors import UserError

DOCUMENT = "-DOCSTART-"
# A word may be "#" itself.
_COMMENT = re.compile(r"#\s*([\w.:]+\s*=|newdoc\b|newpar\b)")
_NAMES = re.compile(r"#\s*global\.columns\s*=\s*(.+)")
_NO_WORD = re.compile(r"[0-9]+[-.][0-9]+")


@dataclass(frozen=True)
class ColumnSentence:
    """A sentence of a column file.

    Attributes:
        tokens, tags: of each word.
        lines: number of each word's line, from 1.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    lines: tuple[int, ...]


@dataclass
class _Columns:
    """Which columns are read; what the file's first lines say decides.

    Attributes:
        names: of the columns, where the file has them.
        width: columns of the first line with a word.
        token, tag: numbers from 0.
    """

    fields: FieldsSection
    names: list[str] | None = None
    width: int = 0
    token: int = 0
    tag: int = 0

    def decide(self, width: int, place: str) -> None:
        """Take the first line with a word, which has ``width`` columns.

        Raises:
            UserError: ``data.fields`` names a column that is not there.
        """
        self.width = width
        self.token = self._number("tokens", self.fields.tokens, 0, place)
        self.tag = self._number("tags", self.fields.tags, width - 1, place)

    def _number(self, key: str, wanted: str | None, usual: int, place: str) -> int:
        if wanted is None:
            return usual
        if self.names is not None and wanted in self.names[: self.width]:
            return self.names.index(wanted)
        if wanted.isdecimal() and 1 <= int(wanted) <= self.width:
            return int(wanted) - 1
        named = f", or of {', '.join(self.names)}" if self.names is not None else ""
        raise UserError(
            f"{place}: data.fields.{key}: found '{wanted}', allowed: a column from 1 to {self.width}{named}"
        )

    def mistake(self, cells: list[str]) -> str | None:
        """What is wrong with a line of a word; None where nothing is."""
        if len(cells) < 2:
            return "found one column, allowed: a word and its tag"
        # The last column is the tag only where all lines have the same columns.
        if self.fields.tags is None and len(cells) != self.width:
            return f"found {len(cells)} columns, allowed: {self.width}, as in the file's first sentence"
        if len(cells) <= max(self.token, self.tag):
            return f"found {len(cells)} columns, allowed: {max(self.token, self.tag) + 1} or more"
        for what, number in (("word", self.token), ("tag", self.tag)):
            if not cells[number].strip():
                return f"found no {what} in column {number + 1}"
        return None


def column_sentences(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[ColumnSentence]:
    """The sentences of a file; with ``data.errors: skip`` those with a bad line are left out, whole, and counted.

    Raises:
        UserError: bad input; names the file and the line.
    """
    with readable(segment.path):
        yield from _sentences(Lines.of(segment, data, errors), _Columns(data.fields), errors)


def _sentences(lines: Lines, columns: _Columns, errors: InputErrors) -> Iterator[ColumnSentence]:
    words: list[tuple[str, str, int]] = []
    whole = True
    for _, line in lines:
        text = line.rstrip("\r\n")
        cells = [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()
        if not text.strip() or cells[0] == DOCUMENT:
            if words and whole:
                yield ColumnSentence(*zip(*words, strict=True))
            words, whole = [], True
            continue
        if _COMMENT.match(text):
            if (found := _NAMES.match(text)) is not None:
                columns.names = found.group(1).split()
            continue
        if not columns.width and len(cells) > 1:
            columns.decide(len(cells), lines.place(lines.count))
        if columns.token > 0 and _NO_WORD.fullmatch(cells[0]):
            continue
        if (mistake := columns.mistake(cells)) is not None:
            errors.bad("malformed", f"{lines.place(lines.count)}: {mistake}")
            whole = False
            continue
        words.append((cells[columns.token], cells[columns.tag], lines.count))
    if words and whole:
        yield ColumnSentence(*zip(*words, strict=True))
