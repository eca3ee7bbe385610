"""Encoder-decoders over HTTP: completions and chat, streamed and whole, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from raylm.compression.exporters.openvino import export_model
from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer
from raylm.data.samples.text_pairs import encode_sources
from raylm.errors import UserError
from raylm.models.encoder_decoders import compile_graphs, pairs_note
from raylm.models.heads import SEQUENCE_TO_SEQUENCE
from raylm.models.writing import OpenVinoWriter, write_greedily
from raylm.serving.stage import check_model, example_request, running_server
from tests.pairs import write_model, write_pairs
from tests.serving.conftest import free_port

PREFIX = "say: "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 for pairs with its export."""
    root = tmp_path_factory.mktemp("t5")
    path = write_model(root / "plain", *write_pairs(root, 30), initializer_factor=3.0, **pairs_note(PREFIX))
    export_model(str(path), root / "openvino", SEQUENCE_TO_SEQUENCE, None)
    shutil.move(root / "openvino", path / "openvino")
    return path


def configuration(model: Path, directory: Path, **serving: object) -> ServeConfig:
    values = {
        "run": {"name": "translator", "storage": str(directory)},
        "model": {"path": str(model)},
        "serving": {"port": free_port(), "cpus_per_replica": 1.0, "max_new_tokens": 32, **serving},
    }
    return validate(ServeConfig, values, "test")


def test_a_model_is_checked_and_announced(model: Path, tmp_path: Path) -> None:
    check_model(configuration(model, tmp_path))
    line = example_request(configuration(model, tmp_path), "http://there", "translator")
    assert "/v1/completions" in line and '"model": "translator"' in line
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "openvino" / "openvino_encoder_model.bin").unlink()
    with pytest.raises(UserError, match=r"^model\.path: .*openvino_encoder_model\.bin is missing"):
        check_model(configuration(broken, tmp_path))
    with pytest.raises(UserError, match=r"serving\.engine: found vllm, .* is no next-token model"):
        check_model(configuration(model, tmp_path, engine="vllm"))


@pytest.fixture(scope="module")
def server(ray_instance: object, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    config = configuration(model, tmp_path_factory.mktemp("runs"))
    with running_server(config) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        yield SimpleNamespace(url=url, client=client)


def written(model: Path, text: str, most: int) -> tuple[str, int]:
    """What the export writes to a text, and how many tokens the text has with the model's prefix."""
    tokenizer = load_tokenizer(model)
    (source,), _ = encode_sources(tokenizer, [text], prefix=PREFIX)
    (ids,) = write_greedily(OpenVinoWriter(compile_graphs(model, 1), str(model)), [source.tolist()], most)
    return tokenizer.decode(ids, skip_special_tokens=True), len(source)


@pytest.mark.slow
def test_completions_and_chat_write_what_the_model_writes(server: SimpleNamespace, model: Path) -> None:
    text = "river stone cloud"
    expected, length = written(model, text, 32)
    whole = server.client.completions.create(model="translator", prompt=text)
    assert whole.choices[0].text == expected
    assert whole.usage.prompt_tokens == length
    assert whole.usage.completion_tokens <= 32
    assert whole.choices[0].finish_reason == ("length" if whole.usage.completion_tokens == 32 else "stop")
    short = server.client.completions.create(model="translator", prompt=[text, "bird"], max_tokens=3)
    assert [choice.text for choice in short.choices] == [written(model, one, 3)[0] for one in (text, "bird")]
    assert [choice.finish_reason for choice in short.choices] == ["length", "length"]

    pieces = list(
        server.client.completions.create(
            model="translator", prompt=text, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens

    messages = [
        {"role": "system", "content": "not read"},
        {"role": "user", "content": "nor this"},
        {"role": "assistant", "content": "ever"},
        {"role": "user", "content": text},
    ]
    chat = server.client.chat.completions.create(model="translator", messages=messages)
    assert chat.choices[0].message.content == expected and chat.usage.prompt_tokens == length
    streamed = server.client.chat.completions.create(model="translator", messages=messages, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in streamed if piece.choices) == expected

    drawn = [
        server.client.completions.create(model="translator", prompt=text, temperature=1.5, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    stop = expected[len(expected) // 2]
    stopped = server.client.completions.create(model="translator", prompt=text, stop=stop)
    assert stopped.choices[0].text == expected[: expected.index(stop)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("completions", {"prompt": "a", "echo": True}, "echo: the model 'translator' is a sequence-to-sequence model"),
        ("completions", {"prompt": "a", "logprobs": 2}, "logprobs: the model 'translator' is a sequence-to-sequence"),
        (
            "completions",
            {"prompt": "a", "response_format": {"type": "json_object"}},
            "response_format: the model 'translator'",
        ),
        ("chat/completions", {"messages": [{"role": "system", "content": "a"}]}, "messages: found none of the user"),
        ("completions", {"prompt": "a", "max_tokens": 33}, "max_tokens: found 33, allowed: at most 32"),
        ("embeddings", {"input": "a"}, "This server does not serve"),
    ],
)
def test_what_it_does_not_do_is_refused(server: SimpleNamespace, route: str, body: dict, message: str) -> None:
    response = httpx.post(f"{server.url}/v1/{route}", json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["message"].startswith(message)


@pytest.mark.slow
def test_it_is_listed_by_its_task(server: SimpleNamespace) -> None:
    [entry] = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (entry["id"], entry["task"]) == ("translator", "sequence_to_sequence")
    state = json.loads(httpx.get(f"{server.url}/health").text)["models"]["translator"]
    assert state["engine"] == "openvino"
