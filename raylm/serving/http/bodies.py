"""What the bodies of all requests have in common: no unknown keys, no guessed types, and text that is text.

A body of 4 MB may hold a million mistakes; to describe them all would take a minute and gigabytes. Lists stop at their
first mistake, and what no request needs so many of is refused before it is looked at one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import ClientDisconnect

from raylm.serving.http.errors import RequestError

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list of a body."""

# Keys of one body, and objects and lists in it.
MOST_KEYS = 64
MOST_CONTAINERS = 40_000
TOO_MANY_CONTAINERS = f"The body holds more than {MOST_CONTAINERS} objects and lists"
# A string of JSON, an unfinished one to the end; possessive, so that no text takes longer than one reading.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class RequestBody(BaseModel):
    """A JSON object that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_more_than_a_request_needs(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > MOST_KEYS:
            raise ValueError(f"The body has {len(values)} parameters, allowed: at most {MOST_KEYS}")
        check_text(values)
        return values


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
