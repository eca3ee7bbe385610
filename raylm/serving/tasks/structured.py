"""``response_format``: the JSON that an answer must be, checked before any engine sees it.

A schema that the grammar library cannot take would fail inside an engine's step, with every request beside it: it is
turned into a grammar here first, by itself. OpenVINO GenAI 2026.4 holds a version of xgrammar just before 0.1.25, so
that is what is pinned.
"""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raylm.serving.engines.base import reason_of
from raylm.serving.http.errors import RequestError

LONGEST_SCHEMA = 100_000
ANY_OBJECT = '{"type": "object"}'
PARAMETER = "response_format"


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


async def wanted_schema(wanted: ResponseFormat | None) -> str | None:
    """The JSON schema that an answer must follow, as text; None where any text will do.

    Raises:
        RequestError: there is no such schema, or it cannot be followed.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None:
        raise RequestError("response_format.json_schema: missing with the type json_schema", parameter=PARAMETER)
    schema = json.dumps(wanted.json_schema.json_schema, ensure_ascii=False)
    if len(schema) > LONGEST_SCHEMA:
        raise RequestError(
            f"response_format: found a schema of {len(schema)} characters, allowed: at most {LONGEST_SCHEMA}",
            parameter=PARAMETER,
        )
    # Loading the library takes a moment, the first time; a large schema does as well.
    if (mistake := await asyncio.to_thread(mistake_in, schema)) is not None:
        raise RequestError(f"response_format: {mistake}", parameter=PARAMETER, code="invalid_schema")
    return schema


@functools.lru_cache(maxsize=256)
def mistake_in(schema: str) -> str | None:
    """Why the schema cannot be followed; None where it can."""
    try:
        import xgrammar
    except ImportError:
        return "this server cannot force JSON: it lacks xgrammar (pip install 'raylm[cpu]')"
    try:
        xgrammar.Grammar.from_json_schema(schema)
    except (RuntimeError, ValueError) as error:
        return f"the schema cannot be followed: {reason_of(error)}"
    return None
