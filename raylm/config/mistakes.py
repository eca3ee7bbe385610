"""What pydantic finds wrong in a configuration, in one line: the key, what was found and what is allowed."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_origin

from pydantic import BaseModel

from raylm.config.base import nested_section
from raylm.config.yaml_text import Place

# Of a value or key in an error.
_SHOWN_CHARACTERS = 100


def describe(model: type[BaseModel], mistakes: list[Any]) -> str:
    """The first of pydantic's ``mistakes``, with the number of further ones.

    A union gives one for each of its branches: the one that went deepest tells most.
    """
    keys = [_keys(model, mistake)[1] for mistake in mistakes]
    same = [number for number in range(len(mistakes)) if keys[number][: len(keys[0])] == keys[0]]
    chosen = max(same, key=lambda number: len(keys[number]))
    others = {".".join(other) for number, other in enumerate(keys) if number not in same}
    more = f" (and {len(others)} more)" if others else ""
    return f"{_describe(model, mistakes[chosen])}{more}"


def as_written(values: Any, mistakes: list[Any], written: dict[Place, str]) -> bool:
    """Put the text that the user wrote where text is wanted and was not found; whether there was any."""
    changed = False
    for mistake in mistakes:
        holder, place, value = None, (), values
        for part in mistake["loc"]:
            # Other parts name a union's branch.
            if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
                holder, place, value = value, (*place, part), value[part]
        if mistake["type"] == "string_type" and holder is not None and value is not None and place in written:
            holder[place[-1]] = written[place]
            changed = True
    return changed


def cut(text: str) -> str:
    """A text as far as an error shows it."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def shown(value: Any) -> str:
    """A value as far as an error shows it."""
    return cut(repr(value))


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    kinds = {list: "a list", dict: "a section", str: "text", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def _describe(model: type[BaseModel], mistake: Any) -> str:
    section, keys = _keys(model, mistake)
    key = ".".join(map(cut, keys))
    found = mistake["input"]
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        allowed = sorted(section.model_fields) if section else []
        close = difflib.get_close_matches(keys[-1], allowed, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        return f"{key}: unknown key; {hint}allowed: {', '.join(allowed)}"
    if mistake["type"] == "missing":
        return f"{key}: missing; this key is required"
    if isinstance(found, dict | list):
        if message.startswith("Input should be "):
            return f"{key}: found {kind_of(found)}, {_allowed(message)}"
        return _under(key, message)
    if found is None and mistake["type"] == "value_error":
        return _under(key, message)
    return f"{key}: found {shown(found)}, {_allowed(message)}"


def _under(key: str, message: str) -> str:
    """What a check of the whole section ``key`` says; a message that begins with a key in it goes on with that key."""
    if not key:
        return message
    return f"{key}.{message}" if re.match(r"[a-z_]+(\.[a-z_]+)*: ", message) else f"{key}: {message}"


def _allowed(message: str) -> str:
    """Pydantic's "Input should be ..." in the words that all our errors use."""
    if message.startswith("Input should be "):
        # It writes large powers of ten in full.
        allowed = re.sub(r"10{8,}\b", lambda number: f"{float(number[0]):g}", message.removeprefix("Input should be "))
        return "allowed: " + re.sub(r"a valid dictionary or instance of \w+", "a section with keys", allowed)
    return message[0].lower() + message[1:]


def _keys(model: type[BaseModel], mistake: Any) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that holds the last key of a mistake, and the keys without the names of a union's branches."""
    location, unknown = [str(part) for part in mistake["loc"]], mistake["type"] == "extra_forbidden"
    section: type[BaseModel] | None = model
    keys: list[str] = []
    named = False
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if named or part.isdigit() or (last and unknown):
            # A name that the user gave, an item of a list, or the mistake itself.
            keys.append(part)
            named = False
        elif section is not None and part in section.model_fields:
            keys.append(part)
            annotation = section.model_fields[part].annotation
            named = get_origin(annotation) is dict
            if not last:
                section = nested_section(annotation)
    return section, keys
