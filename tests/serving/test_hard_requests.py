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
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from raylm.compression.exporters.openvino import export_model
from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer
from raylm.serving.deploy.app import open_service
from raylm.serving.deploy.models import Models
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.requests import QuestionRequest
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"max_tokens": 0}, "max_tokens: 0 is allowed only together with echo"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens: found 1" + "0" * 30 + ", allowed: at most 64 (serving.max_new_tokens)"),
        ({"n": 10**30}, "n: "),
        ({"n": 64, "prompt": ["a", "b"]}, "at most 64 completions"),
        ({"stop": ["x"] * 5000}, "stop: at most 4 strings"),
        ({"logit_bias": {"5": 1e300}}, "logit_bias.5: Input should be less than or equal to 100"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias.5: "),
        ({"logit_bias": {"five": 1}}, "logit_bias: found 'five', allowed: token ids"),
        ({"logit_bias": {"999999": 1}}, "logit_bias: found token id 999999, allowed: 0 to 359"),
        ({"logit_bias": {"9" * 100: 1}}, "logit_bias: found '999"),
        ({"stop_token_ids": [360]}, "stop_token_ids: found token id 360, allowed: 0 to 359"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0: "),
        ({"min_tokens": 5}, "min_tokens: found 5, allowed: at most 4 (max_tokens)"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e30}, "repetition_penalty"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens: found 0, allowed: -1, or 1 and more"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens: found 257, allowed: -1, or 1 to 256"),
        ({"structured_outputs": {}}, "structured_outputs: found none, allowed: one of json, json_object"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs: found regex and choice"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs: json: found a text that is no JSON object"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs: the regular expression cannot be followed"),
        ({"structured_outputs": {"grammar": "root ::= nowhere"}}, "structured_outputs: the grammar cannot be followed"),
        ({"prompt": ["a", [5, "b"]]}, "prompt.1.1: "),
        ({"prompt": ["a", 5]}, "prompt.1: found neither a text nor a list of token ids"),
        ({"prompt": {"a": 1}}, "prompt: found neither a text, nor a list of token ids, nor a list of either"),
        ({"temperature": 1e30}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -1e-30}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": 1.0000001}, "top_p"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": 1e30}, "frequency_penalty"),
        ({"seed": 1e30}, "seed"),
        ({"logprobs": 10**30}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
def test_what_no_engine_may_see_is_refused(served: SimpleNamespace, change: dict[str, Any], message: str) -> None:
    status, answer = served.post("/v1/completions", {"prompt": "the fox", "max_tokens": 4} | change)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answers(served)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"temperature": 1e-30},
        {"temperature": 1e-3, "seed": 1},
        {"top_p": 0},
        {"top_p": 1e-300, "temperature": 2},
        {"seed": 10**30},
        {"seed": -(10**30)},
        {"seed": 2**63},
        {"seed": 2**64 - 1, "temperature": 2},
        {"presence_penalty": 2, "frequency_penalty": -2},
        {"logprobs": 20},
        {"stop": ["x" * 1_000_000] * 4},
        {"stop": ["", "\0"]},
        {"logit_bias": {}},
        {"logit_bias": {"5": 0}},
        {"top_k": 10**30},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "min_tokens": 0, "stop_token_ids": []},
        {"ignore_eos": False, "logit_bias": None, "truncate_prompt_tokens": None, "best_of": 1, "tools": []},
        {"top_k": 2, "min_p": 1, "top_p": 0.5},
        {"repetition_penalty": 1e6, "temperature": 2},
        {"repetition_penalty": 1e-6, "temperature": 1e-3},
        {"min_tokens": 4, "stop_token_ids": list(range(360))[:300]},
        {"truncate_prompt_tokens": 1},
        {"truncate_prompt_tokens": -1, "prompt": "fox " * 5000},
        {"prompt": ["fox", [5, 6]], "max_tokens": 2},
        {"structured_outputs": None, "user": None, "best_of": None, "whatever": None},
    ],
)
def test_what_is_hard_is_answered(served: SimpleNamespace, change: dict[str, Any]) -> None:
    status, answer = served.post("/v1/completions", {"prompt": "the fox", "max_tokens": 4, "temperature": 1} | change)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] <= 4
    assert answers(served)


def test_a_number_of_many_digits_is_refused(served: SimpleNamespace) -> None:
    for key in ("seed", "max_tokens", "n"):
        assert served.post("/v1/completions", f'{{"prompt": "a", "{key}": {"9" * 10_000}}}')[0] == 400
    assert answers(served)


def test_thresholds_are_numbers() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValidationError, match="null_threshold"):
            QuestionRequest(question="who", context="Anna", null_threshold=value)
