"""``response_format`` and ``structured_outputs``: what an answer must be, checked before any engine sees it.

A schema that the grammar library cannot take would fail inside an engine's step, with every request beside it. Here its
size is bounded first, then it is compiled in a process that may die (:mod:`raylm.serving.engines.schemas`). OpenVINO
GenAI 2026.4 holds an xgrammar of its own, just before 0.1.25: the bounds are for what that one cannot take, too.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import Field, model_validator

from raylm.serving.engines.base import Constraint
from raylm.serving.engines.schemas import SchemaChecker, SchemasUnavailable
from raylm.serving.http.bodies import Items, Part
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
RESPONSE_FORMAT, STRUCTURED_OUTPUTS = "response_format", "structured_outputs"
LONGEST_GRAMMAR = 20_000
MOST_CHOSEN = 1000
_ESCAPED = re.compile(r"\\.")


class JsonSchema(Part):
    """``response_format.json_schema``."""

    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """``response_format``: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Part):
    """``structured_outputs``, as vLLM has it: one of the first five."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    """JSON schema that the text must follow, or its text."""
    json_object: bool | None = None
    """The text must be a JSON object."""
    regex: str | None = Field(default=None, min_length=1, max_length=LONGEST_PATTERN)
    """Regular expression of the whole text."""
    choice: Items[str] | None = Field(default=None, min_length=1, max_length=MOST_CHOSEN)
    """Texts, one of which is the answer."""
    grammar: str | None = Field(default=None, min_length=1, max_length=LONGEST_GRAMMAR)
    """Grammar of the text in EBNF, whose first rule is ``root``."""
    disable_any_whitespace: bool = False
    """JSON without white space but one blank behind a comma and a colon."""
    disable_additional_properties: bool = False
    """JSON without properties that the schema does not name, which is so in any case."""

    @model_validator(mode="after")
    def _one_kind(self) -> StructuredOutputs:
        kinds = {
            "json": self.json_, "json_object": self.json_object or None, "regex": self.regex, "choice": self.choice,
            "grammar": self.grammar,
        }  # fmt: skip
        found = [name for name, value in kinds.items() if value is not None]
        if len(found) != 1:
            raise ValueError(f"found {' and '.join(found) or 'none'}, allowed: one of {', '.join(kinds)}")
        return self

    def constraint(self) -> Constraint:
        """What the text must be.

        Raises:
            RequestError: the schema is no JSON object.
        """
        parameter = STRUCTURED_OUTPUTS
        if self.regex is not None:
            return Constraint("regex", self.regex, parameter)
        if self.choice is not None:
            return Constraint("choice", json.dumps(self.choice), parameter)
        if self.grammar is not None:
            return Constraint("grammar", self.grammar, parameter)
        schema: Any = json.loads(ANY_OBJECT) if self.json_ is None else self.json_
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                schema = None
            if not isinstance(schema, dict):
                raise _refusal("json: found a text that is no JSON object", parameter)
        return _of_schema(schema, parameter, compact=self.disable_any_whitespace)


async def wanted_constraint(
    wanted: ResponseFormat | None, outputs: StructuredOutputs | None, checker: SchemaChecker, source: str | None
) -> Constraint | None:
    """What an answer must be; None where any text will do.

    Args:
        wanted: the request's.
        outputs: the request's too; never both of them ask for something.
        checker: compiles schemas.
        source: directory of the model, where its engine compiles with the same library; None where it does not.

    Raises:
        RequestError: there is no such schema, it cannot be followed, or (status 503) it cannot be tried now.
    """
    if outputs is not None:
        constraint = outputs.constraint()
    elif wanted is None or wanted.type == "text":
        return None
    elif wanted.type == "json_object":
        constraint = Constraint("json", ANY_OBJECT)
    elif wanted.json_schema is None:
        raise RequestError("response_format.json_schema: missing with the type json_schema", parameter=RESPONSE_FORMAT)
    else:
        constraint = _of_schema(wanted.json_schema.json_schema, RESPONSE_FORMAT)
    try:
        mistake = await checker.mistake_in(constraint, source)
    except SchemasUnavailable as error:
        raise RequestError(
            str(error), status=503, code="server_busy", kind="server_error", headers={"Retry-After": "1"}
        ) from None
    if mistake is not None:
        raise _refusal(mistake, constraint.parameter)
    return constraint


def _of_schema(schema: dict[str, Any], parameter: str, *, compact: bool = False) -> Constraint:
    if (mistake := excess_of(schema)) is not None:
        raise _refusal(mistake, parameter)
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > LONGEST_SCHEMA:
        raise _refusal(f"found a schema of {len(text)} characters, allowed: at most {LONGEST_SCHEMA}", parameter)
    return Constraint("json", text, parameter, compact)


def _refusal(mistake: str, parameter: str) -> RequestError:
    return RequestError(f"{parameter}: {mistake}", parameter=parameter, code="invalid_schema")


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
