"""``data.augmentation`` through a served model: raylm's own server, and one that fails in every way that servers do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from raylm.config.augmentation import MethodSection, ServedModelSection
from raylm.config.data import DataSection, TokenizerSection
from raylm.data.augmentation.prompts import ask_for_pair, ask_for_text
from raylm.data.augmentation.served_model import AnswerLog, ServedModel, Unanswered, find_model
from raylm.data.prepare.stage import prepare_directory
from raylm.data.sources.documents import make_pair, read_documents
from raylm.errors import RunFailure, UserError

from .conftest import write_jsonl

KEY = "a-key-for-the-tests-0001"


@pytest.fixture(scope="module")
def provider() -> Iterator[SimpleNamespace]:
    """Another party's server with OpenAI's routes; ``state`` says how it fails, ``asked`` what it was asked."""
    state = SimpleNamespace(failures=[], asked=[], answer=lambda text: f"said: {text}", busy=0, most_busy=0)
    state.down, state.refused = False, {}

    async def models(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "who are you?"}}, status=401)
        return web.json_response({"data": [{"id": "one"}, {"id": "two"}]})

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body["messages"][0]["content"]
        state.asked.append(body)
        state.busy += 1
        state.most_busy = max(state.most_busy, state.busy)
        try:
            # Long enough for as many requests as may run at a time to come, on a busy machine too.
            await asyncio.sleep(0.05)
        finally:
            state.busy -= 1
        # A prompt that is refused spends none of the failures, which are those of the next requests.
        kind = "500" if state.down else state.refused.get(prompt)
        kind = kind or (state.failures.pop(0) if state.failures else "fine")
        if kind == "slow":
            await asyncio.sleep(1)
            return web.json_response({})
        if kind.isdigit():
            return web.json_response({"error": {"message": f"failure {kind}"}}, status=int(kind))
        if kind == "no json":
            return web.Response(text="<html>", content_type="text/html")
        reason = "length" if kind == "long" else "stop"
        content = "" if kind == "empty" else state.answer(prompt)
        return web.json_response({"choices": [{"message": {"content": content}, "finish_reason": reason}]})

    loop, ready, address = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", models)
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(site._server.sockets[0].getsockname()[1])
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(30)
    state.url = f"http://127.0.0.1:{address[0]}/v1"
    yield state
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def section(provider: SimpleNamespace, **values) -> ServedModelSection:
    return ServedModelSection(base_url=provider.url, name="one", **values)


def ask(provider: SimpleNamespace, path: Path, question, **values):
    """The answer of ``question(model)``, and the model."""

    async def run():
        log = AnswerLog(path)
        async with ServedModel(section(provider, **values), "one", KEY, log) as model:
            try:
                return await question(model), model
            finally:
                log.close()

    return asyncio.run(run())


def test_what_passes_is_tried_again_and_what_does_not_is_not(provider: SimpleNamespace, tmp_path: Path) -> None:
    provider.failures = ["429", "503", "slow"]
    answer, _ = ask(provider, tmp_path / "log", lambda m: m.ask("hello", 7), timeout_seconds=0.5)
    assert answer == "said: hello" and len(provider.asked) == 4
    assert provider.asked[-1] == {
        "model": "one", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.7, "max_tokens": 256,
        "seed": 7,
    }  # fmt: skip
    # Nothing is asked twice.
    assert ask(provider, tmp_path / "log", lambda m: m.ask("hello", 7))[0] == "said: hello" and len(provider.asked) == 4
    for kind, reason in {"400": "status 400: failure 400", "no json": "no JSON", "long": "longer than max_tokens",
                         "empty": "an empty answer"}.items():  # fmt: skip
        provider.failures, before = [kind], len(provider.asked)
        with pytest.raises(Unanswered, match=reason):
            ask(provider, tmp_path / "log", lambda m, kind=kind: m.ask(kind, 0))
        assert len(provider.asked) == before + 1
    # A line that a crash cut off is forgotten, the others are not.
    with (tmp_path / "log").open("ab") as stream:
        stream.write(b'{"request": "x", "ans')
    assert len(AnswerLog(tmp_path / "log").answers) == 1


def test_the_server_is_checked_first(provider: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"base_url: http://127.0.0.1:9/v1 cannot be reached"):
        find_model(ServedModelSection(base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match=r"/models: status 401: who are you\?"):
        find_model(section(provider))
    with pytest.raises(UserError, match=r"api_key_environment: found RAYLM_TEST_KEY, which is not set"):
        find_model(section(provider, api_key_environment="RAYLM_TEST_KEY"))
    monkeypatch.setenv("RAYLM_TEST_KEY", KEY)
    known = section(provider, api_key_environment="RAYLM_TEST_KEY")
    assert find_model(known) == "one"
    with pytest.raises(UserError, match=r"model.name: found none, allowed: one, two"):
        find_model(known.model_copy(update={"name": None}))


def test_what_the_model_is_asked(provider: SimpleNamespace, tmp_path: Path) -> None:
    def asked(method: dict, text: str) -> list[str]:
        before = len(provider.asked)
        ask(provider, tmp_path / "log", lambda m: ask_for_text(m, MethodSection(**method), text, 0))
        return [body["messages"][0]["content"] for body in provider.asked[before:]]

    (english,) = asked({"method": "paraphrase"}, "a {language} fox")
    assert english.startswith("Rewrite") and english.endswith("\n\na {language} fox")
    (chinese,) = asked({"method": "paraphrase"}, "一只狐狸")
    assert chinese.startswith("请用") and chinese.endswith("一只狐狸")
    there, back = asked({"method": "back_translation", "language": "German"}, "a fox")
    assert "into German." in there and back.endswith(f"said: {there}") and "into English." in back
    (own,) = asked({"method": "paraphrase", "template": "Say {text} again"}, "hi")
    assert own == "Say hi again"
    pair = make_pair("Why?", "Because.", "A passage.")
    provider.answer = lambda _: "Sure!\nQuestion: What\nfor?\nAnswer: For this."
    question, _ = ask(provider, tmp_path / "log", lambda m: ask_for_pair(m, MethodSection(method="generate"), pair, 1))
    assert question == ("What\nfor?", "For this.")
    provider.answer = lambda _: "No."
    with pytest.raises(Unanswered, match="no lines 'Question"):
        ask(provider, tmp_path / "log", lambda m: ask_for_pair(m, MethodSection(method="generate"), pair, 2))


def test_failures_are_counted_and_a_prepare_goes_on_where_it_stopped(
    ray_instance, provider: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLM_TEST_KEY", KEY)
    rows = [{"prompt": f"What is {number}?", "answer": f"It is {number}."} for number in range(60)]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = DataSection(
        train=str(source),
        validation_fraction=0.2,
        augmentation={
            "methods": [{"method": "paraphrase"}],
            "model": {"base_url": provider.url, "name": "one", "api_key_environment": "RAYLM_TEST_KEY", "retries": 0,
                      "concurrency": 3, "max_failures": 0.2},
        },
    )  # fmt: skip

    def answer(text: str) -> str:
        # The server goes down after thirty answers.
        answered.append(text)
        provider.down = len(answered) >= 30
        return f"Say: {text.rpartition(chr(10))[2]}"

    answered: list[str] = []
    provider.answer, provider.asked, provider.most_busy = answer, [], 0
    with pytest.raises(RunFailure, match=r"requests failed, allowed: a share of 0.2 .*most often: status 500"):
        prepare_directory(tmp_path / "set", data, TokenizerSection(type="byte"))
    assert not (tmp_path / "set" / "manifest.json").exists() and len(answered) == 30
    assert provider.most_busy == 3
    # Requests that were given up on the way may still come in: failures are those of prompts, whoever asks.
    unanswered = {body["messages"][0]["content"] for body in provider.asked} - set(answered)
    provider.refused = dict(zip(sorted(unanswered), ["400", "500"], strict=False))
    provider.down, provider.asked = False, []
    provider.answer = lambda text: f"Say: {text.rpartition(chr(10))[2]}"
    prepare_directory(tmp_path / "set", data, TokenizerSection(type="byte"))
    provider.refused = {}
    found = list(read_documents(tmp_path / "set", "train"))
    marks = Counter(document.augmentation.partition(":")[0] for document in found)
    assert marks["paraphrase"] == marks[""] - 2
    # Only what was not answered before was asked again; what was given up may still come in, and asks for that too.
    asked = {body["messages"][0]["content"] for body in provider.asked}
    assert len(asked) == marks[""] - 30 and not asked & set(answered)
    assert {d.prompt for d in found if d.augmentation} <= {f"Say: {row['prompt']}" for row in rows}
    assert KEY not in json.dumps([path.read_text(errors="replace") for path in (tmp_path / "set").rglob("*.json")])


@pytest.fixture(scope="module")
def talking_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained for a moment to answer anything with one question and its answer, and to stop."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("talking") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), LlamaForCausalLM.from_pretrained(tiny_model)
    answer = [*tokenizer.encode("Question: the fox?\nAnswer: the dog."), tokenizer.eos_token_id]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    start = tokenizer.encode("<|assistant|>")
    for step in range(80):
        length = 40 + 20 * (step % 6)
        noise = torch.randint(4, len(tokenizer), (8, length), generator=draw)
        ids = torch.cat([noise, torch.tensor([[*start, *answer]] * 8)], dim=1)
        labels = ids.clone()
        labels[:, : length + len(start)] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_raylm_serve_makes_the_variants(ray_instance, talking_model: Path, tmp_path: Path) -> None:
    import socket

    from raylm.config.loading import validate
    from raylm.config.stages import ServeConfig
    from raylm.serving.stage import running_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {
        "run": {"name": "served", "storage": str(tmp_path / "runs")},
        "model": {"path": str(talking_model)},
        "serving": {"port": port, "engine": "transformers", "cpus_per_replica": 1.0},
    }
    rows = [{"prompt": f"fox {n}", "answer": f"dog {n}"} for n in range(6)]
    with running_server(validate(ServeConfig, values, "test")) as url:
        data = DataSection(
            train=str(write_jsonl(tmp_path / "pairs.jsonl", rows)),
            validation_fraction=0.2,
            augmentation={
                "methods": [{"method": "generate"}, {"method": "paraphrase", "part": "answer", "template": "{text}"}],
                "model": {"base_url": f"{url}/v1", "temperature": 0.0, "max_tokens": 64},
            },
        )
        prepare_directory(tmp_path / "set", data, TokenizerSection(path=str(talking_model)))
    found = list(read_documents(tmp_path / "set", "train"))
    by_method = {name: [d for d in found if d.augmentation.partition(":")[0] == name] for name in ("", "generate")}
    assert len(by_method[""]) == len(by_method["generate"]) >= 3
    assert {(d.prompt, d.answer) for d in by_method["generate"]} == {("the fox?", "the dog.")}
    assert sum(d.answer == "Question: the fox?\nAnswer: the dog." for d in found) == len(by_method[""])
