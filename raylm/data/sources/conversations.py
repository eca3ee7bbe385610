"""Rows of messages to conversations, with the roles and contents that chat templates know.

OpenAI's form (``role``, ``content``, ``tool_calls``, ``weight``), ShareGPT's (``from``, ``value``) and Alpaca's
(``instruction``, ``input``, ``output``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from raylm.config.data import FieldsSection
from raylm.data.sources.documents import Document, make_conversation

ASSISTANT = "assistant"
# What other forms call the roles.
ROLES = {
    "human": "user", "prompter": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT, "chatgpt": ASSISTANT,
    "function_call": ASSISTANT, "function": "tool", "observation": "tool",
}  # fmt: skip
# Of the preset forms, beside those that ``data.fields`` names.
PRESET_COLUMNS = ("instruction", "input", "output", "system", "history")
# Further keys of a message that templates and training read.
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "weight")


def conversation(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    """The conversation of a row; an empty document where it has no messages, or an answer that says nothing.

    Raises:
        ValueError: it is no list of messages, or its last one is no answer.
    """
    messages = row.get(fields.messages)
    if messages is None or messages == []:
        yield Document(text="")
        return
    column = fields.messages
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"column '{column}': found no list of messages with role and content")
    turns = [_message(message, column) for message in messages]
    if fields.preset == "sharegpt":
        turns = _system(_content(row.get("system"), "system")) + turns
    if (last := turns[-1]["role"]) != ASSISTANT:
        raise ValueError(
            f"column '{column}': the conversation ends with a message of '{last}', allowed: of the assistant"
        )
    said = all(turn["content"].strip() or turn.get("tool_calls") for turn in turns if turn["role"] == ASSISTANT)
    yield make_conversation(turns, _tools(row.get(fields.tools), fields.tools)) if said else Document(text="")


def alpaca(row: Mapping[str, Any], fields: FieldsSection) -> Iterator[Document]:
    """The conversation of a row of Alpaca's form: ``system`` and ``history``, pairs of texts, come first.

    Raises:
        ValueError: a value is no text.
    """
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("column 'history': found no list of pairs of texts")
    named = {name: _content(row.get(name), name) for name in ("system", "instruction", "input", "output")}
    turns = _system(named["system"])
    for asked, answered in history:
        turns += [{"role": "user", "content": _content(asked, "history")}]
        turns += [{"role": ASSISTANT, "content": _content(answered, "history")}]
    asked = "\n\n".join(text for text in (named["instruction"], named["input"]) if text.strip())
    turns += [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": named["output"]}]
    said = all(turn["content"].strip() for turn in turns)
    yield make_conversation(turns, []) if said else Document(text="")


def _system(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}] if text.strip() else []


def messages_of(value: Any, column: str, role: str) -> list[dict[str, Any]]:
    """The messages that a value is: a text of ``role``, one message, or a list of them.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        return [{"role": role, "content": encodable(value, column)}]
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError(f"column '{column}': found {type(value).__name__}, allowed: a text, or messages")
    return [_message(message, column) for message in messages]


def _message(message: Mapping[str, Any], column: str) -> dict[str, Any]:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or not ("content" in message or "value" in message):
        raise ValueError(f"column '{column}': a message without role and content; allowed: both, as text")
    found = {"role": ROLES.get(role, role), "content": _content(message.get("content", message.get("value")), column)}
    found |= {key: message[key] for key in KEPT if message.get(key) is not None}
    if found.get("weight", 1) not in (0, 1):
        raise ValueError(f"column '{column}': weight: found {found['weight']!r}, allowed: 0, 1")
    return found


def _content(content: Any, column: str) -> str:
    """What a message says: a text, the texts of a list of parts, or nothing where it only calls a tool.

    Raises:
        ValueError: it is something else, or a part of it is.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return encodable(content, column)
    if not isinstance(content, list):
        raise ValueError(f"column '{column}': found a content of {type(content).__name__}, allowed: text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"column '{column}': a message has a part of type {kind}, allowed: text")
        texts.append(encodable(text, column))
    return "\n".join(texts)


def _tools(tools: Any, column: str) -> list[Any]:
    """The tools that a conversation may call, also where they are written as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"column '{column}': not valid JSON: {error}") from None
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ValueError(f"column '{column}': found {type(tools).__name__}, allowed: a list of tools")
    return tools


def encodable(value: str, column: str) -> str:
    """The text itself.

    Raises:
        ValueError: JSON can spell half of a surrogate pair, which is no character.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column '{column}': not valid Unicode at character {error.start}") from None
    return value
