"""The routes as clients use them: the ``openai`` package and plain HTTP against a server on Ray Serve, both engines."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving import browser

pytestmark = pytest.mark.slow

API_KEY = "a-key-for-the-tests-0001"
PROMPT = "the quick brown fox"


def post(server: SimpleNamespace, route: str, body: Any, **headers: str) -> tuple[int, dict, Message]:
    """Status, body and headers of a POST; ``body`` is JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"} | headers
    request = urllib.request.Request(server.url + route, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def health(server: SimpleNamespace) -> dict:
    with urllib.request.urlopen(f"{server.url}/health", timeout=30) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def model(exported_model: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(exported_model)


@pytest.fixture(scope="module")
def tokenizer(exported_model: Any) -> Any:
    return AutoTokenizer.from_pretrained(exported_model)


def test_models(server: SimpleNamespace) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny", "other"]
    assert server.client.models.retrieve("other").id == "other"
    assert health(server)["models"]["tiny"]["engine"] == server.engine


def test_both_models_answer(server: SimpleNamespace) -> None:
    for name in ("tiny", "other"):
        completion = server.client.completions.create(model=name, prompt=PROMPT, max_tokens=5, temperature=0)
        assert completion.model == name
        assert completion.usage.completion_tokens == 5


def test_stream_is_the_whole_text_and_counts(server: SimpleNamespace) -> None:
    arguments = {"model": "tiny", "prompt": [PROMPT, "over the"], "max_tokens": 30, "temperature": 0, "n": 2}
    whole = server.client.completions.create(**arguments)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    chunks = list(server.client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    texts = [""] * 4
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 120


def test_seed_and_stop(server: SimpleNamespace) -> None:
    def sampled(seed: int, **more: Any) -> str:
        arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 1.5, "seed": seed, **more}
        return server.client.completions.create(**arguments).choices[0].text

    one = sampled(1)
    assert one == sampled(1) != sampled(2)
    stop = one[5:7]
    assert sampled(1, stop=[stop, "zzzz"]) == one[: one.index(stop)]


def test_penalties_change_the_text(server: SimpleNamespace) -> None:
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    plain = server.client.completions.create(**arguments).choices[0].text
    assert server.client.completions.create(**arguments, frequency_penalty=2).choices[0].text != plain


def test_echo_and_logprobs(server: SimpleNamespace, model: Any, tokenizer: Any) -> None:
    """What lm-eval's ``local-completions`` reads, against transformers."""
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    expected = [float(logprobs[place - 1, ids[place]]) for place in range(1, len(ids))]
    tolerance = 1e-4 if server.engine == "transformers" else 0.05
    for prompt in (PROMPT, ids):
        choice = server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=2, seed=1
        ).choices[0]
        assert choice.text.startswith(PROMPT)
        found = choice.logprobs
        assert len(found.tokens) == len(ids) + 1
        assert "".join(found.tokens[: len(ids)]) == PROMPT
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1:-1] == pytest.approx(expected, abs=tolerance)
        assert found.text_offset == [len(tokenizer.decode(ids[:place])) for place in range(len(ids) + 1)]
        # The generated token is the likeliest.
        assert max(found.top_logprobs[-1].values()) == found.token_logprobs[-1]
    scored = server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == PROMPT
    assert scored.usage.completion_tokens == 0


def test_logprobs_of_what_was_generated(server: SimpleNamespace) -> None:
    completion = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=1, n=2
    )
    for choice in completion.choices:
        assert len(choice.logprobs.token_logprobs) == 6
        for value, likeliest in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
            assert value == pytest.approx(max(likeliest.values()), abs=0.05)
    messages = [{"role": "user", "content": "fox"}]
    chat = server.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in content] == [3] * chat.usage.completion_tokens
    chunks = server.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-4)


def test_embeddings(server: SimpleNamespace, model: Any, tokenizer: Any) -> None:
    texts = [PROMPT, "over the lazy dog"]
    reply = server.client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    plain = server.client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert reply.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    for text, encoded, listed in zip(texts, reply.data, plain.data, strict=True):
        assert encoded.embedding == pytest.approx(listed.embedding, abs=1e-6)
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0]
        expected = hidden.mean(dim=0)
        assert float(torch.tensor(listed.embedding) @ expected / expected.norm()) > 0.999
    status, body, _ = post(server, "/v1/embeddings", {"input": PROMPT, "encoding_format": "base64"})
    assert status == 200
    assert len(base64.b64decode(body["data"][0]["embedding"])) == 4 * model.config.hidden_size


@pytest.mark.parametrize(
    ("route", "body", "status", "code", "says"),
    [
        ("/v1/completions", b"{not json", 400, None, "JSON"),
        ("/v1/completions", b"[1]", 400, None, "object"),
        ("/v1/completions", rb'{"prompt": "\ud800"}', 400, "invalid_value", "surrogate"),
        ("/v1/chat/completions", rb'{"messages": [{"role": "user", "content": "\udfff"}]}', 400, None, "surrogate"),
        ("/v1/collections", rb'{"\ud800": "a"}', 400, None, "surrogate"),
        ("/v1/completions", {"model": "tiny"}, 400, "missing_parameter", "prompt"),
        ("/v1/completions", {"model": "nobody", "prompt": "a"}, 404, "model_not_found", "nobody"),
        ("/v1/completions", {"prompt": "fox " * 300}, 400, "context_length_exceeded", "256"),
        ("/v1/completions", {"prompt": [999]}, 400, None, "999"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "invalid_value", "echo"),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400, "invalid_value", "max_tokens"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "invalid_value", "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": float("nan")}, 400, "invalid_value", "temperature"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"a": 5}}, 400, "invalid_value", "logit_bias"),
        ("/v1/completions", {"prompt": "a", "bad_words": ["b"]}, 400, "unsupported_parameter", "bad_words"),
        ("/v1/completions", {"prompt": ["a"] * 40, "n": 2}, 400, "invalid_value", "64"),
        (
            "/v1/completions",
            {"prompt": "fox " * 300, "echo": True, "max_tokens": 0},
            400,
            "context_length_exceeded",
            "",
        ),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid_value", "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": ""}]}, 400, None, "messages"),
        ("/v1/embeddings", {"input": []}, 400, None, "input"),
        ("/v1/embeddings", {"input": "fox " * 300}, 400, "context_length_exceeded", "256"),
        ("/v1/nowhere", {}, 404, None, "nowhere"),
        ("/v1/models", {}, 405, None, "models"),
    ],
)
def test_mistakes(server: SimpleNamespace, route: str, body: Any, status: int, code: str | None, says: str) -> None:
    found, reply, _ = post(server, route, body)
    assert found == status, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert says in reply["error"]["message"]
    assert code is None or reply["error"]["code"] == code


def test_keys(server: SimpleNamespace) -> None:
    for wrong in ("", "Bearer wrong", f"Basic {API_KEY}", f"Bearer {API_KEY}x"):
        status, reply, headers = post(server, "/v1/completions", {"prompt": "a"}, Authorization=wrong)
        assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
        assert "wrong" not in json.dumps(reply)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_smallest_top_p_is_allowed(server: SimpleNamespace) -> None:
    status, reply, _ = post(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "top_p": 5e-324, "seed": 1})
    assert (status, reply["usage"]["completion_tokens"]) == (200, 2)


def test_request_ids_come_back(server: SimpleNamespace) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    answer = post(server, "/v1/completions", body, **{"X-Request-Id": "mine-1"})
    assert answer[2].get_all("x-request-id") == ["mine-1"]
    assert len(post(server, "/v1/completions", body)[2].get_all("x-request-id")) == 1
    assert len(post(server, "/v1/completions", body, **{"X-Request-Id": "no\tgood"})[2]["x-request-id"]) == 32


def test_a_hundred_megabytes_are_refused(server: SimpleNamespace) -> None:
    """Sent whole by a client that does not wait for the answer; it may find the connection closed instead."""
    megabyte, host = b" " * 1_000_000, server.url.removeprefix("http://").split(":")
    with socket.create_connection((host[0], int(host[1])), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {API_KEY}\r\nContent-Length: 100000000\r\n\r\n".encode()
        )
        sent = 0
        try:
            for _ in range(100):
                connection.sendall(megabyte)
                sent += len(megabyte)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""
    assert not answer or (b" 413 " in answer.split(b"\r\n")[0] and b"body_too_large" in answer), (sent, answer)
    # The server is none the worse for it.
    alone = server.client.completions.create(model="tiny", prompt="a", max_tokens=1, temperature=0)
    assert alone.usage.completion_tokens == 1


def test_a_long_body_is_refused_unread(server: SimpleNamespace) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Authorization", f"Bearer {API_KEY}")
    connection.putheader("Content-Length", str(100 * 1000 * 1000))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.load(response)["error"]["code"] == "body_too_large"


def test_a_long_body_of_unknown_length_is_refused(server: SimpleNamespace) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    chunks = (b" " * 100_000 for _ in range(15))
    connection.request("POST", "/v1/completions", chunks, headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert "1000000" in json.load(response)["error"]["message"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_place(server: SimpleNamespace, streaming: bool) -> None:
    before = health(server)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 200, "n": 64, "stream": streaming}).encode()
    # The queue holds half of them.
    body = body.replace(b'"n": 64', b'"n": 32')
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {API_KEY}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        if streaming:
            assert connection.recv(10)
        else:
            end = time.monotonic() + 60
            while health(server)["requests"] == before["requests"]:
                assert time.monotonic() < end
        # Reset instead of a polite end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end = time.monotonic() + 60
    while (now := health(server))["running"] + now["waiting"]:
        assert time.monotonic() < end, now
        time.sleep(0.05)
    assert now["cancelled"] > before["cancelled"]


def test_a_full_queue_says_when_to_come_back(server: SimpleNamespace) -> None:
    # 8 places and 24 to wait in; one request may ask for 64 texts.
    status, reply, headers = post(server, "/v1/completions", {"prompt": PROMPT, "n": 40, "max_tokens": 100})
    assert (status, reply["error"]["code"]) == (503, "server_busy")
    assert int(headers["retry-after"]) >= 1


def test_the_page_is_open_and_needs_nothing_from_elsewhere(server: SimpleNamespace) -> None:
    with urllib.request.urlopen(f"{server.url}/", timeout=30) as response:
        page = response.read().decode()
        assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html")
    assert "v1/chat/completions" in page
    assert "://" not in page


def test_the_openapi_document_names_the_routes_and_errors(server: SimpleNamespace) -> None:
    request = urllib.request.Request(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {API_KEY}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        document = json.load(response)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/qa"} <= set(document["paths"])
    answers = {
        (path, method, status): set(answer.get("content", ()))
        for path, route in document["paths"].items()
        for method, operation in route.items()
        for status, answer in operation["responses"].items()
    }
    assert {400, 401, 413, 429, 503} <= {int(key[2]) for key in answers if key[0] == "/v1/completions"}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/qa"):
        assert answers[path, "post", "200"] == {"application/json", "text/event-stream"}
    assert answers["/metrics", "get", "200"] == {"text/plain"}
    assert answers["/v1/collections", "post", "409"] == {"application/json"}


async def fill_in(page: browser.Page, kind: str, text: str, tokens: int) -> str:
    """Fill in the form, send it, and give the figures that stand there at the end."""
    await page.run(f"document.querySelector('[value={kind}]').click()")
    await page.run(f"get('text').value = {json.dumps(text)}; get('tokens').value = {tokens}; get('send').click()")
    await page.until("!get('send').disabled")
    return await page.run("get('figures').textContent")


async def use_the_page(server: SimpleNamespace, directory: Path) -> None:
    async with browser.opened(server.url, directory / "profile") as page:
        # Without a key the page says what is missing.
        await page.until("get('figures').textContent.includes('API key')")
        await page.run(f"get('key').value = {json.dumps(API_KEY)}; get('key').dispatchEvent(new Event('change'))")
        await page.until("get('model').length === 2 && get('collection').length > 0")
        page.exceptions.clear()  # the browser logs the 401

        figures = await fill_in(page, "completions", "the quick brown fox", 24)
        assert "first token" in figures and "ms" in figures and "tokens 24" in figures, figures
        shown = await page.run("document.querySelector('.answer').textContent")
        expected = server.client.completions.create(
            model="tiny", prompt="the quick brown fox", max_tokens=24, temperature=0
        )
        assert shown == "the quick brown fox" + expected.choices[0].text

        for turn in (1, 2):
            assert "tokens" in await next_turn(page, f"fox {turn}", turn)
        assert await page.run("messages.length") == 4

        await fill_in(page, "qa", "What does json.dumps do?", 16)
        assert await page.run("document.querySelectorAll('#sources li').length") > 0
        await page.run("get('context').value = 'The fox is brown and quick.'")
        assert "tokens" in await next_turn(page, "Which colour has the fox?", 2)
        assert await page.run("document.querySelector('#sources').textContent.includes('The fox is brown')")
        if os.environ.get("RAYLM_SCREENSHOT"):
            await page.photograph(Path(os.environ["RAYLM_SCREENSHOT"]))

        # What a mistake brings is shown, and the form works again.
        assert "max_tokens" in await fill_in(page, "completions", "a", 100_000)
        assert not [entry for entry in page.exceptions if "400" not in entry], page.exceptions


async def next_turn(page: browser.Page, text: str, turn: int) -> str:
    """A turn of one chat: choosing the kind anew would begin another one."""
    if turn == 1:
        return await fill_in(page, "chat", text, 8)
    await page.run(f"get('text').value = {json.dumps(text)}; get('send').click()")
    await page.until("!get('send').disabled")
    return await page.run("get('figures').textContent")


@pytest.mark.skipif(browser.BROWSER is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(server: SimpleNamespace, tmp_path: Path) -> None:
    if server.engine != "openvino":
        pytest.skip("the page is the same for every engine")
    asyncio.run(asyncio.wait_for(use_the_page(server, tmp_path), 3 * browser.SECONDS))


def schema_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "test", "schema": schema, "strict": True}}


def test_answers_follow_a_schema(server: SimpleNamespace) -> None:
    colours = ["red", "green", "a blue that is like the sea"]
    values = []
    for seed in range(6):
        reply = server.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "colour?"}], seed=seed, max_tokens=64,
            response_format=schema_format({"enum": colours}),
        )  # fmt: skip
        assert reply.choices[0].finish_reason == "stop"
        values.append(json.loads(reply.choices[0].message.content))
    assert set(values) <= set(colours)
    # Chance still decides.
    assert len(set(values)) > 1
    stream = server.client.completions.create(
        model="tiny", prompt="the", stream=True, temperature=0, max_tokens=32,
        extra_body={"response_format": schema_format({"type": "boolean"})},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) in ("true", "false")
    opened = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=4, response_format={"type": "json_object"}
    )
    assert opened.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "(("}, "paren"),
    ],
)
def test_bad_schemas_are_refused_and_hurt_nobody(server: SimpleNamespace, schema: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "?"}], response_format=schema_format(schema)
        )
    after = server.client.completions.create(model="tiny", prompt="the", max_tokens=3, temperature=0)
    assert after.usage.completion_tokens == 3
