"""The HTTP application in one process, without Ray: hostile requests are refused, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.serving.deploy.app import open_service
from raylm.serving.deploy.models import Models
from raylm.serving.http.gate import Gate, Limits
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.routes import create_app
from raylm.serving.retrieval.opening import open_library

Ask = Callable[[str, dict[str, Any]], Awaitable[httpx.Response]]


@pytest.fixture
def served(tiny_model: Path, tmp_path: Path) -> Callable[[Callable[[Ask], Awaitable[None]]], None]:
    """Runs a coroutine function with what posts a body to a route of the application over the tiny model."""

    async def serve(use: Callable[[Ask], Awaitable[None]]) -> None:
        values = {"run": {"name": "tiny", "storage": str(tmp_path)}, "model": {"path": str(tiny_model)}}
        settings = validate(ServeConfig, values, "test")
        metrics = ServerMetrics(export=False)
        models = Models([open_service(settings, "tiny", 1, metrics)])
        app = Gate(create_app(models, metrics, open_library(settings, 1)), Limits.of(settings.serving), {}, metrics)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
                await use(lambda route, body: client.post(route, json=body))
        finally:
            models.services[0].engine.close()
            models.services[0].schemas.close()

    return lambda use: asyncio.run(serve(use))


def chat_body(schema: dict[str, Any]) -> dict[str, Any]:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    messages = [{"role": "user", "content": "?"}]
    return {"messages": messages, "max_tokens": 8, "temperature": 0, "response_format": format_}


def test_many_vectors_and_names_are_those_of_one(served: Callable) -> None:
    async def use(ask: Ask) -> None:
        texts = ["the quick brown fox", "over the lazy dog"] * 64
        one = (await ask("/v1/embeddings", {"input": texts[0]})).json()["data"][0]["embedding"]
        many = (await ask("/v1/embeddings", {"input": texts})).json()
        assert [item["index"] for item in many["data"]] == list(range(128))
        assert many["usage"]["total_tokens"] > 128
        np.testing.assert_allclose(many["data"][126]["embedding"], one, atol=1e-5)
        coded = (await ask("/v1/embeddings", {"input": texts, "encoding_format": "base64"})).json()["data"][0]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded["embedding"]), "<f4"), one, atol=1e-5)
        body = {"prompt": "the quick brown fox " * 12, "echo": True, "max_tokens": 0}
        few = (await ask("/v1/completions", body | {"logprobs": 1})).json()["choices"][0]["logprobs"]
        named = (await ask("/v1/completions", body | {"logprobs": 20})).json()["choices"][0]["logprobs"]
        assert named["tokens"] == few["tokens"]
        assert named["token_logprobs"] == pytest.approx(few["token_logprobs"])
        # Parts of characters look alike, and share a name.
        assert len(named["top_logprobs"][5]) > len(few["top_logprobs"][5])

    served(use)


def test_hostile_schemas_and_prompts_hold_up_nobody(served: Callable) -> None:
    async def use(ask: Ask) -> None:
        assert (await ask("/v1/chat/completions", chat_body({"type": "boolean"}))).status_code == 200
        slow = [
            {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(900 + place)}}
            for place in range(6)
        ]
        refused = [
            asyncio.create_task(ask("/v1/chat/completions", chat_body({"oneOf": [s] * 2, "anyOf": [s, {}]})))
            for s in slow
        ]
        refused += [
            asyncio.create_task(ask("/v1/chat/completions", chat_body({"$ref": "#"}))),
            asyncio.create_task(ask("/v1/chat/completions", chat_body({"pattern": "(" * 40_000 + ")" * 40_000}))),
            asyncio.create_task(ask("/v1/completions", {"prompt": "a" * 3_900_000})),
            asyncio.create_task(ask("/v1/completions", {"prompt": [1.5] * 900_000})),
        ]
        await asyncio.sleep(0)
        began = time.monotonic()
        known = await ask("/v1/chat/completions", chat_body({"type": "boolean"}))
        assert known.status_code == 200
        assert time.monotonic() - began < 10
        for reply in await asyncio.gather(*refused):
            assert reply.status_code == 400
            assert "\n" not in reply.json()["error"]["message"]
        assert (await ask("/v1/completions", {"prompt": "the", "max_tokens": 3})).status_code == 200

    served(use)
