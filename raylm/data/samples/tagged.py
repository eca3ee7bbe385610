"""Sentences whose words have tags: from column files, and from rows with two lists.

In: the ``data`` section. Out: :class:`TaggedSentence`, in the order of the files.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raylm.config.data import DataSection, FieldsSection
from raylm.data.samples.sides import measured_on, with_sides
from raylm.data.samples.tag_schemes import KnownScheme, mistake
from raylm.data.sources.blocks import Segment
from raylm.data.sources.column_files import column_sentences
from raylm.data.sources.conversations import encodable
from raylm.data.sources.documents import Split
from raylm.data.sources.segments import open_sources
from raylm.data.sources.streams import InputErrors
from raylm.data.sources.tables import open_table
from raylm.errors import UserError

FORMATS = ("conll", "jsonl", "json", "parquet", "hub")
TOKENS, TAGS = "tokens", "tags"


@dataclass(frozen=True)
class TaggedSentence:
    """Words with a tag each.

    Attributes:
        tokens, tags: at least one, and as many.
        origin: file, or the place of the row in it.
        lines: of each word, in a column file.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    origin: str
    lines: tuple[int, ...] = ()

    def place(self, number: int) -> str:
        """Where a word stands, for people."""
        return f"{self.origin}:{self.lines[number]}" if self.lines else f"{self.origin}: word {number + 1}"


def read_tagged(data: DataSection) -> Iterator[tuple[Split, TaggedSentence]]:
    """All sentences with their side; where there is no ``data.validation`` a share is held out by the words' hash.

    Raises:
        UserError: a source is wrong or of another format; names the file and the place.
    """
    return with_sides(data, functools.partial(_of_sources, data), lambda sentence: " ".join(sentence.tokens))


def evaluation_tagged(data: DataSection, split: Split = "validation") -> list[TaggedSentence]:
    """The sentences that a tagger is measured on: ``data.validation`` where it is given, else all of ``data.train``.

    Raises:
        UserError: a source is wrong, or holds no sentence.
    """
    return measured_on(data, split, functools.partial(_of_sources, data), "sentence")


def fitting(sentences: Iterable[TaggedSentence], scheme: KnownScheme, data: DataSection) -> Iterator[TaggedSentence]:
    """The sentences, checked; with ``data.errors: skip`` those that do not follow the scheme are left out and counted.

    Raises:
        UserError: one does not; names the file and the line or row.
    """
    errors = InputErrors.of(data)
    for sentence in sentences:
        if (found := mistake(sentence.tags, scheme)) is None:
            yield sentence
        else:
            errors.bad("out of the scheme", f"{sentence.place(found[0])}: {found[1]}")
    errors.say("data")


def _of_sources(data: DataSection, names: list[Any], key: str) -> Iterator[TaggedSentence]:
    errors = InputErrors.of(data)
    for source in open_sources(data, names, key):
        for segment in source.segments:
            if segment.format not in FORMATS:
                raise UserError(
                    f"{key}: {source.name}: found the format {segment.format}, allowed with tags: {', '.join(FORMATS)} "
                    "(data.format: conll reads column files of any suffix)"
                )
            yield from (_of_columns if segment.format == "conll" else _of_rows)(segment, data, errors)
    errors.say(key)


def _of_columns(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[TaggedSentence]:
    for found in column_sentences(segment, data, errors):
        yield TaggedSentence(found.tokens, found.tags, segment.path, found.lines)


def _of_rows(segment: Segment, data: DataSection, errors: InputErrors) -> Iterator[TaggedSentence]:
    fields = data.fields
    tokens, tags = fields.tokens or TOKENS, fields.tags or TAGS
    # The readers of tables read these columns of a file, whatever they are called.
    columns = FieldsSection(text=tokens, label=tags)
    table = open_table(segment, data.model_copy(update={"fields": columns}), errors)
    for number, row in table.rows:
        place = table.place(number)
        try:
            words = _strings(_list(row, tokens), tokens)
            names = _strings(_list(row, tags), tags, fields.tag_names)
            if not words:
                raise ValueError(f"column '{tokens}': found no word, allowed: one or more")
            if len(words) != len(names):
                raise ValueError(
                    f"found {len(words)} words in '{tokens}' and {len(names)} tags in '{tags}', allowed: as many tags "
                    "as words"
                )
        except ValueError as error:
            errors.bad("malformed", f"{place}: {error}")
            continue
        yield TaggedSentence(words, names, place)


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    if column not in row:
        raise ValueError(f"no column '{column}'; columns found: {', '.join(row) or 'none'}; name yours in data.fields")
    if not isinstance(row[column], list | tuple):
        raise ValueError(f"column '{column}': found {type(row[column]).__name__}, allowed: a list")
    return list(row[column])


def _strings(values: list[Any], column: str, names: list[str] | None = None) -> tuple[str, ...]:
    """The values, numbers by their ``names``.

    Raises:
        ValueError: one is empty or no text.
    """
    found = []
    for place, value in enumerate(values, start=1):
        if names is not None and _is_number(value):
            if not 0 <= value < len(names):
                raise ValueError(
                    f"column '{column}', value {place}: found {value}, allowed: 0 to {len(names) - 1} "
                    "(data.fields.tag_names)"
                )
            found.append(names[value])
            continue
        if not isinstance(value, str):
            hint = "; data.fields.tag_names names numbers" if _is_number(value) and names is None else ""
            raise ValueError(f"column '{column}', value {place}: found {type(value).__name__}, allowed: text{hint}")
        if not value.strip():
            raise ValueError(f"column '{column}', value {place}: found an empty text, allowed: one with a letter")
        found.append(encodable(value, column))
    return tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
