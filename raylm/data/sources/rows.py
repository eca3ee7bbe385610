"""Rows with columns to documents, prompt/answer pairs, turns of a conversation, or questions in the SQuAD format."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from raylm.config.data import FieldsSection
from raylm.data.sources.documents import Document, make_pair
from raylm.data.sources.squad import COLUMNS as SQUAD_COLUMNS
from raylm.data.sources.squad import CONTEXT, answers_of, is_squad
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError

# (place in the file, row); what the place is, its table knows.
Rows = Iterator[tuple[int, Mapping[str, Any]]]
ANSWERING = ("assistant", "gpt", "bot", "model")


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
    wanted = {fields.text, fields.prompt, fields.answer, fields.context, fields.messages, fields.label}
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
    if kind is None:
        raise UserError(
            f"{table.origin}: no column '{fields.text}' (nor both '{fields.prompt}' and '{fields.answer}'); columns "
            f"found: {', '.join(columns) or 'none'}; name yours in data.fields"
        )
    make = {"text": _text, "pair": _pair, "messages": _conversation, "squad": _squad_pair}[kind]
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
    """What rows with these columns are: text, pair, messages, squad, or None."""
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
    answer = next((_encodable(text, "answers") for text, _ in answers_of(row)), "")
    complete = question.strip() and answer.strip()
    yield make_pair(question, answer, context if fields.context else "") if complete else Document(text="")


def _conversation(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    """A pair for every answer of a conversation, with what was said before as its context.

    All turns of one conversation are on one side of the split, which the whole of it decides: many begin with the same
    words of the system.
    """
    messages = row.get(fields.messages)
    if messages is None or messages == []:
        yield Document(text="")
        return
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"column '{fields.messages}': found no list of messages with role and content")
    turns: list[tuple[str, str]] = []
    for message in messages:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or not ("content" in message or "value" in message):
            raise ValueError(f"column '{fields.messages}': a message without role and content; allowed: both, as text")
        content = _content(message.get("content", message.get("value")), fields.messages)
        turns.append((role, _encodable(content, fields.messages)))
    key = "\n".join(f"{role}: {content}" for role, content in turns)
    answered = False
    for number, (role, content) in enumerate(turns):
        if role not in ANSWERING or number == 0 or turns[number - 1][0] in ANSWERING or not content.strip():
            continue
        before = turns[: number - 1]
        context = "\n".join(text if who == "system" else f"{who}: {text}" for who, text in before if text.strip())
        prompt = turns[number - 1][1]
        if prompt.strip():
            answered = True
            yield make_pair(prompt, content, context, split_key=key)
    if not answered:
        yield Document(text="")


def _content(content: Any, column: str) -> str:
    """What a message says: a text, the texts of a list of parts, or nothing where it only calls a tool.

    Raises:
        ValueError: it is something else, or a part of it is.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"column '{column}': found a content of {type(content).__name__}, allowed: text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"column '{column}': a message has a part of type {kind}, allowed: text")
        texts.append(text)
    return "\n".join(texts)


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
    return _encodable(value, column)


def _encodable(value: str, column: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        raise ValueError(f"column '{column}': not valid Unicode at character {error.start}") from None
    return value
