"""What the bodies of all requests have in common: no unknown keys, no guessed types, and text that is text.

A body of 4 MB may hold a million mistakes; to describe them all would take a minute and gigabytes. Lists stop at their
first mistake, and what no request needs so many of is refused before it is looked at one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from starlette.requests import ClientDisconnect

from raylm.serving.http.errors import IDS, LIST, TEXT, RequestError

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list of a body."""
TokenIds = Annotated[Items[Annotated[int, Field(ge=0)]], Field(min_length=1)]


# The kind of a value is chosen by a look at it: a mistake is then one of that kind, not one of each.
def _kind(value: Any) -> str | None:
    if isinstance(value, list):
        return IDS if value and isinstance(value[0], int) else LIST
    return TEXT if isinstance(value, str) else None


def _list_or_text(value: Any) -> str | None:
    return LIST if isinstance(value, list) else TEXT if isinstance(value, str) else None


Prompt = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[TokenIds, Tag(IDS)],
    Discriminator(
        lambda value: IDS if isinstance(value, list) else TEXT if isinstance(value, str) else None,
        custom_error_type="kind",
        custom_error_message="found neither a text nor a list of token ids",
    ),
]
"""A text or its token ids."""
Prompts = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[TokenIds, Tag(IDS)] | Annotated[Items[Prompt], Tag(LIST)],
    Discriminator(
        _kind,
        custom_error_type="kind",
        custom_error_message="found neither a text, nor a list of token ids, nor a list of either",
    ),
]
"""One prompt, or a list of them."""
Texts = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[Items[str], Tag(LIST)],
    Discriminator(
        _list_or_text, custom_error_type="kind", custom_error_message="found neither a text nor a list of texts"
    ),
]
"""A text, or a list of them."""

# What tells a server how to keep, bill or schedule a request, on any route: whatever the value, the answer is the same.
ADVICE = frozenset(
    {
        "cache_prompt", "cache_salt", "metadata", "parallel_tool_calls", "prediction", "priority", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "request_id", "safety_identifier",
        "service_tier", "store", "user", "verbosity",
    }
)  # fmt: skip

# Keys of one body, and objects and lists in it.
MOST_KEYS = 64
MOST_CONTAINERS = 40_000
TOO_MANY_CONTAINERS = f"The body holds more than {MOST_CONTAINERS} objects and lists"
# A string of JSON, an unfinished one to the end; possessive, so that no text takes longer than one reading.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class Part(BaseModel):
    """A JSON object within a body. A null is the same as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        return cls._asked(values) if isinstance(values, dict) else values

    @classmethod
    def _asked(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        """What of ``values`` asks for something."""
        return {name: value for name, value in values.items() if value is not None}


class RequestBody(Part):
    """A JSON object that a client sends.

    Attributes:
        idle: parameters that are not supported, and their values that change nothing.
    """

    idle: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def _asked(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        if len(values) > MOST_KEYS:
            raise ValueError(f"The body has {len(values)} parameters, allowed: at most {MOST_KEYS}")
        check_text(values)
        return {
            name: value
            for name, value in super()._asked(values).items()
            if name in cls.model_fields or not (name in ADVICE or _changes_nothing(value, cls.idle.get(name, ())))
        }


def _changes_nothing(value: Any, idle: tuple[Any, ...]) -> bool:
    # True == 1 in Python, but "logprobs": 0 asks for something and "logprobs": false does not.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in idle)


def as_list(texts: str | list[Any]) -> list[Any]:
    """One text or one list of token ids as a list of them; a list as it is."""
    return [texts] if isinstance(texts, str) or (texts and isinstance(texts[0], int)) else texts


class BodyRoute(APIRoute):
    """A route that counts the objects and lists of a body before they are made: a million take the loop a second."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls with each request.

        Raises:
            RequestError: the body holds too many, or the client left.
        """
        answer = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                body = await request.body()
            except ClientDisconnect:
                raise RequestError("The client left before the body had come") from None
            if _opened(body) > MOST_CONTAINERS and _opened(_STRING.sub(b"", body)) > MOST_CONTAINERS:
                raise RequestError(TOO_MANY_CONTAINERS, code="invalid_value")
            return await answer(request)

        return counted


def _opened(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def check_text(body: Any) -> None:
    """Refuse half of a surrogate pair anywhere in ``body``, and too many objects and lists.

    JSON can name such a half (RFC 8259, section 8.2): no tokenizer, file or answer can hold it.

    Raises:
        ValueError: says what was found.
    """
    waiting, seen = [body], 0
    while waiting:
        value = waiting.pop()
        texts = [value] if isinstance(value, str) else []
        if isinstance(value, dict | list):
            seen += 1
            if seen > MOST_CONTAINERS:
                raise ValueError(TOO_MANY_CONTAINERS)
            inner = list(value.values()) if isinstance(value, dict) else value
            # Of a million token ids none need be looked at by itself.
            kinds = set(map(type, inner))
            texts = [*value] if isinstance(value, dict) else []
            if str in kinds:
                texts += [item for item in inner if isinstance(item, str)]
            if dict in kinds or list in kinds:
                waiting += [item for item in inner if isinstance(item, dict | list)]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise ValueError("The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
