"""``response_format``: the JSON that an answer must be, checked before any engine sees it.

A schema that the grammar library cannot take would fail inside an engine's step, with every request beside it. Here its
size is bounded first, then it is compiled in a process that may die (:mod:`raylm.serving.engines.schemas`). OpenVINO
GenAI 2026.4 holds an xgrammar of its own, just before 0.1.25: the bounds are for what that one cannot take, too.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raylm.serving.engines.schemas import SchemaChecker, SchemasUnavailable
from raylm.serving.http.errors import RequestError

LONGEST_SCHEMA = 100_000
# Objects and arrays of the schema's own JSON inside of each other: a level of an object takes two.
MOST_DEPTH = 64
MOST_PROPERTIES = 1000
LONGEST_PATTERN = 1000
MOST_GROUPS = 32
# For minProperties and maxProperties the library counts which of the properties came, in as many states.
MOST_COUNTED = 1000
# Of minLength, maxItems and their like.
MOST_REPEATED = 1_000_000
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains")
ANY_OBJECT = '{"type": "object"}'
PARAMETER = "response_format"
_ESCAPED = re.compile(r"\\.")


class JsonSchema(BaseModel):
    """``response_format.json_schema``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """``response_format``: text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


async def wanted_schema(wanted: ResponseFormat | None, checker: SchemaChecker, source: str | None) -> str | None:
    """The JSON schema that an answer must follow, as text; None where any text will do.

    Args:
        wanted: the request's.
        checker: compiles schemas.
        source: directory of the model, where its engine compiles with the same library; None where it does not.

    Raises:
        RequestError: there is no such schema, it cannot be followed, or (status 503) it cannot be tried now.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        schema = ANY_OBJECT
    elif wanted.json_schema is None:
        raise RequestError("response_format.json_schema: missing with the type json_schema", parameter=PARAMETER)
    else:
        if (mistake := excess_of(wanted.json_schema.json_schema)) is not None:
            raise _refusal(mistake)
        schema = json.dumps(wanted.json_schema.json_schema, ensure_ascii=False)
        if len(schema) > LONGEST_SCHEMA:
            raise _refusal(f"found a schema of {len(schema)} characters, allowed: at most {LONGEST_SCHEMA}")
    try:
        mistake = await checker.mistake_in(schema, source)
    except SchemasUnavailable as error:
        raise RequestError(
            str(error), status=503, code="server_busy", kind="server_error", headers={"Retry-After": "1"}
        ) from None
    if mistake is not None:
        raise _refusal(mistake)
    return schema


def _refusal(mistake: str) -> RequestError:
    return RequestError(f"response_format: {mistake}", parameter=PARAMETER, code="invalid_schema")


def excess_of(schema: dict[str, Any]) -> str | None:
    """What of the schema is more than is allowed; None where nothing is. Takes time in proportion to its size."""
    properties, waiting = 0, [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MOST_DEPTH:
            return f"found a schema that is nested more than {MOST_DEPTH} deep, allowed: at most {MOST_DEPTH}"
        if isinstance(value, dict):
            if (mistake := _excess_of_object(value)) is not None:
                return mistake
            if isinstance(value.get("properties"), dict):
                properties += len(value["properties"])
                if properties > MOST_PROPERTIES:
                    return f"found a schema of more than {MOST_PROPERTIES} properties, allowed: {MOST_PROPERTIES}"
        inner = value.values() if isinstance(value, dict) else value
        waiting += [(item, depth + 1) for item in inner if isinstance(item, dict | list)]
    return None


def _excess_of_object(value: dict[str, Any]) -> str | None:
    """What one object of the schema asks too much of."""
    patterns = [value.get("pattern")]
    named = value.get("patternProperties")
    patterns += list(named) if isinstance(named, dict) else []
    for pattern in patterns:
        if isinstance(pattern, str) and (mistake := _excess_of_pattern(pattern)) is not None:
            return mistake
    for key in COUNTS:
        count = value.get(key)
        if isinstance(count, int | float) and not 0 <= count <= MOST_REPEATED:
            return f"found {key}: {count:.6g}, allowed: 0 to {MOST_REPEATED}"
    listed = value.get("properties")
    for key in ("minProperties", "maxProperties"):
        count = value.get(key)
        if isinstance(count, int | float) and isinstance(listed, dict) and len(listed) * count > MOST_COUNTED:
            return (
                f"found {key}: {count:g} of {len(listed)} properties, allowed: their product at most {MOST_COUNTED}; "
                "name those that must come in required"
            )
    return None


def _excess_of_pattern(pattern: str) -> str | None:
    if len(pattern) > LONGEST_PATTERN:
        return f"found a pattern of {len(pattern)} characters, allowed: at most {LONGEST_PATTERN}"
    depth = deepest = 0
    for character in _ESCAPED.sub("", pattern):
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > MOST_GROUPS:
        return f"found a pattern with groups nested {deepest} deep, allowed: at most {MOST_GROUPS}"
    return None
