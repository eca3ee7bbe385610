"""``raylm serve`` as a user runs it: a real process, real HTTP, the ``openai`` client."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylm.errors import UserError


def write_config(directory: Path, model: Path, port: int) -> Path:
    path = directory / "serve.yaml"
    path.write_text(
        f"run: {{name: server, storage: {directory}}}\nmodel: {{path: {model}}}\n"
        f"serving: {{port: {port}, name: tiny, engine: transformers}}\n"
    )
    return path


def command(path: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "raylm.cli", "serve", str(path), *overrides]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(command(write_config(directory, tiny_model, port)), env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not healthy(url):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
def test_a_page_under_another_name_gets_nothing(server: str) -> None:
    request = urllib.request.Request(
        f"{server}/v1/models", headers={"Host": f"evil.example:{server.rpartition(':')[2]}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="421"):
        urllib.request.urlopen(request, timeout=30)


@pytest.mark.slow
def test_completion_equals_generate_and_streams(server: str, tiny_model: Path) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = tokenizer("the quick brown", return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    arguments = {"model": "tiny", "prompt": "the quick brown", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**arguments)
    assert whole.choices[0].text == expected
    assert whole.usage.prompt_tokens == ids.shape[1]
    streamed = client.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == expected


@pytest.mark.slow
def test_chat_answers_and_streams_the_same(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    arguments = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    streamed = client.chat.completions.create(**arguments, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 8


@pytest.mark.slow
def test_mistakes_are_openai_errors(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="256"):
        client.completions.create(model="tiny", prompt="fox " * 400, max_tokens=8)


@pytest.mark.slow
def test_the_rest_of_the_openai_client(server: str) -> None:
    """Its stream helper, raw answers, the asynchronous client, and its own errors."""
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    arguments = {"model": "tiny", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 60, "temperature": 0}
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    # The stream helper raises where a text ends for its length.
    arguments["stop"] = re.search("[a-zA-Z]{2}", whole)[0]
    whole = client.chat.completions.create(**arguments).choices[0]
    assert whole.finish_reason == "stop"
    with client.chat.completions.stream(**arguments) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(pieces) == final.message.content == whole.message.content
    assert final.finish_reason == "stop"
    raw = client.chat.completions.with_raw_response.create(**arguments, extra_headers={"X-Request-Id": "raw-1"})
    assert "raw-1" in raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == whole.message.content

    async def asynchronously() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            reply = await client.chat.completions.create(**arguments)
            stream = await client.chat.completions.create(**arguments, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [reply.choices[0].message.content, streamed]

    assert set(asyncio.run(asynchronously())) == {whole.message.content}
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="fox " * 300)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_a_server_whose_engine_died_answers_again(server: str) -> None:
    ours = psutil.Process().children(recursive=True)
    engine = next(process for process in ours if "raylm.serving.engines.process" in " ".join(process.cmdline()))
    engine.kill()
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=30)
    end = time.monotonic() + 120
    while True:
        try:
            reply = client.completions.create(model="tiny", prompt="fox", max_tokens=2, temperature=0)
            break
        except openai.APIError:
            assert time.monotonic() < end
            time.sleep(0.5)
    assert reply.usage.completion_tokens == 2
    assert engine.pid not in psutil.pids()


@pytest.mark.parametrize("broken", ["missing model", "damaged model", "port in use"])
def test_refused_with_one_line(broken: str, tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        model = tiny_model
        if broken == "missing model":
            taken.close()
            model = tmp_path / "nowhere"
        elif broken == "damaged model":
            taken.close()
            model = shutil.copytree(tiny_model, tmp_path / "damaged")
            weights = model / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:100])
        result = subprocess.run(
            command(write_config(tmp_path, model, port)), capture_output=True, text=True, timeout=120
        )
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if not line.startswith("serve: ")]
    assert len(errors) == 1, result.stderr
    assert {"missing model": "nowhere", "damaged model": "model.safetensors is damaged"}.get(
        broken, str(port)
    ) in errors[0]


@pytest.mark.slow
def test_a_conversation_in_the_terminal_is_the_same_over_http(server: str, tiny_model: Path) -> None:
    from raylm.serving.terminal.local import LocalModel
    from raylm.serving.terminal.remote import RemoteModel

    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
    remote, local = RemoteModel(server, None, 8, 0.0, 0), LocalModel(str(tiny_model), 8, 0.0, 0)
    assert remote.name == "tiny"
    pieces = list(remote.answer(messages))
    assert "".join(pieces) == "".join(local.answer(messages))
    with pytest.raises(UserError, match="does not exist; served: 'tiny'"):
        list(RemoteModel(f"{server}/v1/", "nobody", 8, 0.0, 0).answer(messages))
