"""Bodies that are wrong a million times over are refused in a moment, for their first mistake."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import ValidationError

from raylm.serving.http.bodies import MOST_CONTAINERS, MOST_KEYS, BodyRoute, RequestBody
from raylm.serving.http.errors import RequestError, _describe, install_error_handlers
from raylm.serving.http.requests import ChatRequest, CompletionRequest, EmbeddingRequest, QuestionRequest
from raylm.serving.tasks.classification import ClassifyRequest

MESSAGE = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [1.5] * 800_000}),
        (CompletionRequest, {"prompt": [[]] * 800_000}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 1_000_000}),
        (CompletionRequest, {"prompt": "a"} | {f"k{number}": None for number in range(200_000)}),
        (EmbeddingRequest, {"input": [[1, -1]] * 500_000}),
        (ClassifyRequest, {"input": [7] * 1_000_000}),
        (ChatRequest, {"messages": [{"role": "x"}] * 200_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 400_000}]}),
        (ChatRequest, {"messages": [MESSAGE] * 100_000}),
    ],
    ids=["floats", "empty lists", "stops", "keys", "ids", "numbers", "roles", "parts", "messages"],
)
def test_a_million_mistakes_are_one(kind: type[RequestBody], body: dict[str, Any]) -> None:
    """They took a minute of the event loop and 3 GB to describe."""
    began = time.process_time()
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate(body)
    assert len(refusal.value.errors()) < 10
    assert time.process_time() - began < 2


BRACES = "[{" * (MOST_CONTAINERS // 2)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" + b"[]," * MOST_CONTAINERS + b"[]]", "too many"),
        (b'{"a": "\\\\", "b": [' + b"{}," * MOST_CONTAINERS + b"1]}", "too many"),
        # Brackets within texts are none, after escaped quotes and in a text without an end too.
        (json.dumps({"a": f'{BRACES}"{BRACES}\\', "b": [1]}).encode(), "taken"),
        (b'{"a": "' + b"[" * 100_000, "taken"),
        (b'"' + b'\\"' * 1_000_000 + b"[" * 100_000, "taken"),
    ],
)
def test_objects_are_counted_before_they_are_made(body: bytes, status: str) -> None:
    app = FastAPI()
    app.router.route_class = BodyRoute
    install_error_handlers(app)
    seen = []

    @app.post("/")
    async def route(request: Request) -> None:
        seen.append(await request.body())

    began = time.process_time()
    reply = TestClient(app).post("/", content=body)
    assert time.process_time() - began < 2
    if status == "taken":
        assert (reply.status_code, seen) == (200, [body])
    else:
        assert (reply.status_code, seen) == (400, [])
        assert reply.json()["error"]["message"] == f"The body holds more than {MOST_CONTAINERS} objects and lists"


def test_what_a_message_quotes_leaves_it_one_line() -> None:
    for name in ("data: [DONE]\n\n", "\r\n\r\n", "a" * 100_000, "a\u2028b\x85"):
        message = RequestError(f"The model '{name}' does not exist", status=404).body["error"]["message"]
        assert len(message.splitlines()) == 1
        assert message.startswith("The model '")
        assert len(message) < 2000


def test_what_may_be_large_is_taken() -> None:
    assert len(CompletionRequest.model_validate({"prompt": [5] * 1_000_000}).prompts[0]) == 1_000_000
    assert len(ChatRequest.model_validate({"messages": [MESSAGE] * 10_000}).messages) == 10_000
    assert len(EmbeddingRequest.model_validate({"input": ["a"] * 256}).inputs) == 256


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (CompletionRequest, {"prompt": "a\ud800"}, "half of a surrogate pair"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
            "surrogate pair",
        ),
        (CompletionRequest, {"prompt": "a", "response_format": {"type": {"\ud800": [1]}}}, "half of a surrogate pair"),
        (CompletionRequest, {"prompt": [[]] * (MOST_CONTAINERS + 1)}, f"more than {MOST_CONTAINERS} objects and lists"),
        (CompletionRequest, {f"k{n}": 1 for n in range(MOST_KEYS + 1)}, f"65 parameters, allowed: at most {MOST_KEYS}"),
        (CompletionRequest, {"prompt": "a", "temperature": float("nan")}, "finite number"),
        (QuestionRequest, {"question": "a", "null_threshold": float("inf")}, "finite number"),
        (CompletionRequest, {"prompt": "a", "n" * 10**6: 1}, "Unsupported parameter: n"),
    ],
)
def test_the_mistake_is_named_in_one_line(kind: type[RequestBody], body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate(body)
    first = refusal.value.errors()[0]
    said = _describe(first | {"loc": ("body", *first["loc"])})["error"]["message"]
    assert message in said
    assert "\n" not in said
    assert len(said) < 400
