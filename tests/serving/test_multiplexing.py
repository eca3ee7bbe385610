"""Replicas that hold fewer models than they serve: loaded when asked for, in place of the one unused for longest."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HEADER = "serve_multiplexed_model_id"
PROMPT = "the quick brown fox"


def ask(url: str, model: str, prompt: str | list[str] = PROMPT, max_tokens: int = 5, **headers: str) -> dict:
    """Whole completions of ``model``."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def loads(url: str) -> dict[str, dict]:
    """What /health says of each model."""
    with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
        return json.load(response)["models"]


def loaded(url: str) -> set[str]:
    return {name for name, load in loads(url).items() if load["loaded"]}


@pytest.fixture
def models(exported_model: Path, tmp_path: Path) -> dict[str, dict]:
    """Three more models; ``third`` has a directory of its own."""
    shutil.copytree(exported_model, tmp_path / "third")
    return {
        "second": {"path": str(exported_model), "engine": "transformers"},
        "third": {"path": str(tmp_path / "third")},
        "fourth": {"path": str(exported_model)},
    }


@pytest.fixture
def server(
    ray_instance: Any, serve_config: Callable[..., Any], models: dict[str, dict], tmp_path: Path
) -> Iterator[SimpleNamespace]:
    """A replica of four models that holds two of them."""
    from raylm.serving.stage import running_server

    config = serve_config(name="first", models=models, loaded_models=2, max_concurrent_requests=2)
    with running_server(config) as url:
        yield SimpleNamespace(url=url, third=tmp_path / "third")


def test_models_come_and_go(server: SimpleNamespace) -> None:
    assert loaded(server.url) == {"first", "second"}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        # Texts in work end whole although their model has to go: `second` and `third` are asked for meanwhile.
        long = pool.submit(ask, server.url, "first", [PROMPT] * 60, 200)
        end = time.monotonic() + 90
        while not loads(server.url)["first"]["running"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        ask(server.url, "second")
        text = ask(server.url, "third")["choices"][0]["text"]
        assert long.done()
        assert long.result()["usage"]["completion_tokens"] == 60 * 200
        assert loaded(server.url) == {"second", "third"}
        # More models than there is room for, all at once, and what each says is what it says alone.
        names = ["first", "second", "third", "fourth"] * 4
        answers = list(pool.map(lambda name: ask(server.url, name), names))
    assert [answer["model"] for answer in answers] == names
    assert {answer["choices"][0]["text"] for answer in answers if answer["model"] != "second"} == {text}
    assert len(loaded(server.url)) == 2
    # Counters outlive engines.
    requests = {name: load["requests"] for name, load in loads(server.url).items()}
    assert requests == {"first": 64, "second": 5, "third": 5, "fourth": 4}


def test_a_model_that_cannot_be_loaded_fails_alone(server: SimpleNamespace) -> None:
    (server.third / "openvino" / "openvino_model.bin").unlink()
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server.url, "third")
    error = json.load(caught.value)["error"]
    assert caught.value.code == 500
    assert error["code"] == "engine_failure"
    assert "third" in error["message"]
    assert ask(server.url, "second")["usage"]["completion_tokens"] == 5
    assert ask(server.url, "fourth")["usage"]["completion_tokens"] == 5


def test_requests_go_to_the_replica_that_has_their_model(
    ray_instance: Any, serve_config: Callable[..., Any], models: dict[str, dict]
) -> None:
    from raylm.serving.stage import running_server

    config = serve_config(
        name="first", models={"fourth": models["fourth"]}, loaded_models=1, replicas=2, cpus_per_replica=0.5
    )

    def served() -> dict[str, list[str]]:
        """The models of each replica's requests."""
        logs = (config.run.directory / "logs").glob("requests-*.jsonl")
        lines = {log.name: [json.loads(line) for line in log.read_text().splitlines()] for log in logs}
        return {name: [line["model"] for line in rows if line.get("model")] for name, rows in lines.items()}

    with running_server(config) as url:
        before, end = served(), time.monotonic() + 60
        # One of the replicas gives `first` up for `fourth`; the router hears of it a moment later.
        while True:
            for name in ("first", "fourth") * 8:
                ask(url, name, **{HEADER: name})
            rounds = {replica: set(names[len(before.get(replica, [])) :]) for replica, names in served().items()}
            if sorted(map(sorted, rounds.values())) == [["first"], ["fourth"]]:
                break
            assert time.monotonic() < end, rounds
            before = served()
