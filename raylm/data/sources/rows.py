"""Rows with columns to documents, prompt/answer pairs, conversations, or questions in the SQuAD format."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from raylm.config.data import FieldsSection
from raylm.data.sources.conversations import PRESET_COLUMNS, alpaca, conversation, encodable
from raylm.data.sources.documents import Document, make_pair
from raylm.data.sources.squad import COLUMNS as SQUAD_COLUMNS
from raylm.data.sources.squad import CONTEXT, answers_of, is_squad
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError

# (place in the file, row); what the place is, its table knows.
Rows = Iterator[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Table:
    """The rows of a segment.

    Attributes:
        origin: the file, for messages.
        rows: (number, row).
        place: writes out the place of a row by its number.
        first_columns: gives the columns of the file's first row where ``rows`` begin later.
    """

    origin: str
    rows: Rows
    place: Callable[[int], str]
    first_columns: Callable[[], list[str] | None] | None = None


def wanted_columns(names: Sequence[str], fields: FieldsSection) -> list[str]:
    """Those of a file's columns that are read at all."""
    if fields.preset is not None:
        return [name for name in names if name in {*PRESET_COLUMNS, fields.messages, fields.tools, fields.label}]
    wanted = {
        fields.chosen,
        fields.rejected,
        fields.text,
        fields.prompt,
        fields.answer,
        fields.context,
        fields.messages,
        fields.tools,
        fields.label,
    }
    if is_squad(names):
        wanted |= set(SQUAD_COLUMNS)
    return [name for name in names if name in wanted]


def rows_to_documents(
    table: Table, fields: FieldsSection, errors: InputErrors, needs_label: bool = False
) -> Iterator[Document]:
    """Documents of a table. The first row's columns decide: prompt and answer are a pair, messages a conversation,
    question and answers with their context one of SQuAD's pairs, otherwise the text column is a document.

    Args:
        table: see above.
        fields: names of the columns.
        errors: what to do with a bad row.
        needs_label: take a text without a label for a bad row.

    Raises:
        UserError: a column is missing, or a value is no text; names the place, the column and the columns found.
    """
    first = next(table.rows, None)
    if first is None:
        return
    columns = (table.first_columns and table.first_columns()) or list(first[1])
    kind = kind_of(columns, fields)
    if kind is None and fields.preset is not None:
        needed = "instruction, output" if fields.preset == "alpaca" else fields.messages
        raise UserError(
            f"{table.origin}: no columns of the form {fields.preset} ({needed}); columns found: "
            f"{', '.join(columns) or 'none'}"
        )
    if kind is None:
        raise UserError(
            f"{table.origin}: no column '{fields.text}' (nor both '{fields.prompt}' and '{fields.answer}'); columns "
            f"found: {', '.join(columns) or 'none'}; name yours in data.fields"
        )
    make = {"text": _text, "pair": _pair, "messages": conversation, "alpaca": alpaca, "squad": _squad_pair}[kind]
    rows = itertools.chain([first], table.rows)
    for number, row in _each_context(rows) if kind == "text" and is_squad(columns) and fields.text == CONTEXT else rows:
        try:
            if fields.label is None:
                yield from make(row, fields)
                continue
            label, documents = _label(row, fields.label), list(make(row, fields))
        except ValueError as error:
            errors.bad("malformed", f"{table.place(number)}: {error}")
            continue
        if needs_label and not label.strip() and any(document.text.strip() for document in documents):
            errors.bad(
                "without a label",
                f"{table.place(number)}: column '{fields.label}': found no label, allowed: one in every row; "
                "data.errors: skip leaves such rows out and counts them",
            )
            continue
        yield from (replace(document, label=label) for document in documents)


def _each_context(rows: Rows) -> Rows:
    """The first row of each context: those of the other questions about it would be the same document again."""
    seen: set[int] = set()
    for number, row in rows:
        context = row.get(CONTEXT)
        key = xxhash.xxh3_128_intdigest(context.encode(errors="replace")) if isinstance(context, str) else None
        if key not in seen:
            yield number, row
        if key is not None:
            seen.add(key)


def kind_of(columns: Sequence[str], fields: FieldsSection) -> str | None:
    """What rows with these columns are: text, pair, messages, alpaca, squad, or None."""
    if fields.preset == "alpaca":
        return "alpaca" if {"instruction", "output"} <= set(columns) else None
    if fields.preset is not None:
        return "messages" if fields.messages in columns else None
    if "text" in fields.model_fields_set and fields.text in columns:
        return "text"
    if fields.prompt in columns and fields.answer in columns:
        return "pair"
    if fields.messages in columns:
        return "messages"
    if fields.text in columns:
        return "text"
    return "squad" if is_squad(columns) else None


def _text(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    yield Document(text=_value(row, fields.text))


def _pair(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    prompt, answer = _value(row, fields.prompt), _value(row, fields.answer)
    context = _value(row, fields.context) if fields.context else ""
    complete = prompt.strip() and answer.strip()
    yield make_pair(prompt, answer, context) if complete else Document(text="")


def _squad_pair(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    """The question with its first answer; without an answer an empty document."""
    question, context = _value(row, "question"), _value(row, "context")
    answer = next((encodable(text, "answers") for text, _ in answers_of(row)), "")
    complete = question.strip() and answer.strip()
    yield make_pair(question, answer, context if fields.context else "") if complete else Document(text="")


def _label(row: Mapping[str, Any], column: str) -> str:
    """A class, which may be a number or true and false as well; empty where there is none."""
    value = row.get(column)
    if isinstance(value, float) and math.isnan(value):
        # What pandas writes for a number that is missing.
        return ""
    return str(value) if isinstance(value, int | float) else _value(row, column)


def _value(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"no column '{column}'; columns found: {', '.join(row) or 'none'}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"column '{column}': found {type(value).__name__}, allowed: text")
    return encodable(value, column)
