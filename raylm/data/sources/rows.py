"""Rows with columns to documents, prompt/answer pairs or turns of a conversation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from raylm.config.data import FieldsSection
from raylm.data.sources.documents import Document, make_pair
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError

# (place in the file, row); what the place is, its reader knows.
Rows = Iterator[tuple[int, Mapping[str, Any]]]
ANSWERING = ("assistant", "gpt", "bot", "model")


def is_wanted(name: str, fields: FieldsSection) -> bool:
    """Whether a column is read at all."""
    return name in (fields.text, fields.prompt, fields.answer, fields.context, fields.messages, fields.label)


def rows_to_documents(
    rows: Rows,
    fields: FieldsSection,
    origin: str,
    errors: InputErrors,
    place: Callable[[int], str],
    first_columns: Callable[[], list[str] | None] | None = None,
) -> Iterator[Document]:
    """Documents of (place, row). The first row's columns decide: prompt and answer are a pair, messages a conversation,
    otherwise the text column is a document.

    Args:
        rows: see above.
        fields: names of the columns.
        origin: the file, for messages.
        errors: what to do with a bad row.
        place: writes out a row's place.
        first_columns: gives the columns of the file's first row where ``rows`` begin later; called if there are any.

    Raises:
        UserError: a column is missing, or a value is no text; names the place, the column and the columns found.
    """
    first = next(rows, None)
    if first is None:
        return
    columns = (first_columns and first_columns()) or list(first[1])
    kind = _kind(columns, fields)
    if kind is None:
        raise UserError(
            f"{origin}: no column '{fields.text}' (nor both '{fields.prompt}' and '{fields.answer}'); columns found: "
            f"{', '.join(columns) or 'none'}; name yours in data.fields"
        )
    make = {"text": _text, "pair": _pair, "messages": _conversation}[kind]
    for number, row in itertools.chain([first], rows):
        try:
            if fields.label is None:
                yield from make(row, fields)
            else:
                label = _label(row, fields.label)
                yield from (replace(document, label=label) for document in make(row, fields))
        except ValueError as error:
            errors.bad("malformed", f"{place(number)}: {error}")


def _kind(columns: list[str], fields: FieldsSection) -> str | None:
    """What the rows are: text, pair, messages, or None."""
    if "text" in fields.model_fields_set and fields.text in columns:
        return "text"
    if fields.prompt in columns and fields.answer in columns:
        return "pair"
    if fields.messages in columns:
        return "messages"
    return "text" if fields.text in columns else None


def _text(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    yield Document(text=_value(row, fields.text))


def _pair(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    prompt, answer = _value(row, fields.prompt), _value(row, fields.answer)
    context = _value(row, fields.context) if fields.context else ""
    complete = prompt.strip() and answer.strip()
    yield make_pair(prompt, answer, context) if complete else Document(text="")


def _conversation(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    """A pair for every answer of a conversation, with what was said before as its context.

    All turns of one conversation are on one side of the split.
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
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"column '{fields.messages}': a message without role and content; allowed: both, as text")
        turns.append((role, _encodable(content, fields.messages)))
    key = turns[0][1]
    answered = False
    for number, (role, content) in enumerate(turns):
        if role not in ANSWERING or number == 0 or turns[number - 1][0] in ANSWERING or not content.strip():
            continue
        before = turns[: number - 1]
        context = "\n".join(text if who == "system" else f"{who}: {text}" for who, text in before)
        prompt = turns[number - 1][1]
        if prompt.strip():
            answered = True
            yield make_pair(prompt, content, context, split_key=key)
    if not answered:
        yield Document(text="")


def _label(row: Mapping[str, Any], column: str) -> str:
    """A class, which may be a number or true and false as well."""
    value = row.get(column)
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
