"""Requests that could end or stop an engine for everyone: each gets its own answer, and the engine answers the next.

The application runs in this process over real engine processes, without Ray.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM

from raylm.compression.exporters.openvino import export_model
from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer
from raylm.serving.deploy.app import open_service
from raylm.serving.deploy.service import Models
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.routes import create_app
from raylm.serving.retrieval.opening import open_library

# Rows of the embedding: the tokenizer has some 300 ids, the last of an added token.
ROWS = 360
ADDED, BEYOND = "<|added|>", "<|400|>"


@pytest.fixture(scope="module")
def padded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a padded vocabulary, exported too."""
    directory = tmp_path_factory.mktemp("padded") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    model.save_pretrained(directory)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens([ADDED])
    tokenizer.save_pretrained(directory)
    export_model(str(directory), directory / "openvino")
    return directory


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def served(
    request: pytest.FixtureRequest, padded_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """The application over one engine; gives ``service`` and ``post``, which sends a body and gives status and JSON."""
    values = {
        "run": {"name": "tiny", "storage": str(tmp_path_factory.mktemp("runs"))},
        "model": {"path": str(padded_model)},
        "serving": {"engine": request.param, "max_new_tokens": 64},
    }
    config = validate(ServeConfig, values, "test")
    service = open_service(config, "tiny", threads=1)
    # A start with a tokenizer that is larger than the embedding is refused; ids may have gaps all the same.
    service.tokenizer.add_tokens([f"<|{number}|>" for number in range(len(service.tokenizer), 401)])
    app = create_app(Models([service]), ServerMetrics(export=False), open_library(config, 1))

    def post(route: str, body: Any) -> tuple[int, dict[str, Any]]:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
                content = body if isinstance(body, str) else json.dumps(body)
                return await client.post(route, content=content, headers={"Content-Type": "application/json"})

        response = asyncio.run(send())
        return response.status_code, response.json()

    yield SimpleNamespace(service=service, post=post)
    service.engine.close()


def answers(served: SimpleNamespace) -> bool:
    status, body = served.post("/v1/completions", {"prompt": "the fox", "max_tokens": 4, "temperature": 0})
    return status == 200 and body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("completions", {"prompt": [5, ROWS]}, "prompt: found token id 360, allowed: 0 to 359"),
        ("completions", {"prompt": [[5], [2**70]]}, f"prompt: found token id {2**70}, allowed: 0 to 359"),
        ("completions", {"prompt": [ROWS], "echo": True, "max_tokens": 0}, "prompt: found token id 360"),
        ("completions", {"prompt": f"fox {BEYOND}"}, "prompt: found token id 400, allowed: 0 to 359"),
        ("chat/completions", {"messages": [{"role": "user", "content": BEYOND}]}, "messages: found token id 400"),
        ("embeddings", {"input": [5, 400]}, "input: found token id 400, allowed: 0 to 359"),
        ("embeddings", {"input": ["fox", BEYOND]}, "input: found token id 400, allowed: 0 to 359"),
    ],
)
def test_ids_beyond_the_embedding_are_refused(
    served: SimpleNamespace, route: str, body: dict[str, Any], message: str
) -> None:
    status, answer = served.post(f"/v1/{route}", body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answers(served)


def test_negative_ids_are_refused(served: SimpleNamespace) -> None:
    for route, key in (("completions", "prompt"), ("embeddings", "input")):
        assert served.post(f"/v1/{route}", {key: [5, -1]})[0] == 400
    assert answers(served)


def test_ids_of_a_padded_vocabulary_are_taken(served: SimpleNamespace) -> None:
    status, answer = served.post("/v1/completions", {"prompt": [5, ROWS - 1], "max_tokens": 4, "temperature": 0})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    status, answer = served.post("/v1/completions", {"prompt": f"fox {ADDED}", "max_tokens": 0, "echo": True})
    assert (status, answer["choices"][0]["text"]) == (200, f"fox {ADDED}")
    assert served.post("/v1/embeddings", {"input": [ROWS - 1, 3]})[0] == 200
