"""An engine that hangs is told from one that takes its time, and no request waits longer than it may."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForSequenceClassification

from raylm.config.loading import validate
from raylm.config.serving import ServingSection
from raylm.config.stages import ServeConfig
from raylm.data.loading import load_tokenizer
from raylm.serving.deploy.app import open_service
from raylm.serving.deploy.service import ModelService
from raylm.serving.engines.base import EngineFailure, EngineTimeout, SamplingParameters
from raylm.serving.engines.client import Engine, start_engine
from raylm.serving.engines.liveness import Pulse
from raylm.serving.http.requests import CompletionRequest, EmbeddingRequest
from raylm.serving.retrieval.encoder import Encoder
from raylm.serving.tasks.classification import ClassifyRequest, classify
from raylm.serving.tasks.completions import complete
from raylm.serving.tasks.embeddings import embed
from raylm.serving.tasks.logprobs import chat_logprobs
from tests.reading import write_encoder

# A request may take as long, and a process may stand still as long.
SECONDS, STILL = 1.5, 2.0


class Process:
    """What a :class:`Pulse` sees of a process, on a clock that the test moves."""

    def __init__(self, longest_step: float = 600.0) -> None:
        self.now, self.cpu, self.asked = 1000.0, 50.0, 0
        self.pulse = Pulse(self._ask, lambda: self.cpu, longest_step, clock=lambda: self.now)

    def _ask(self) -> None:
        self.asked += 1

    def look_for(self, seconds: float, share: float, every: float = 5.0) -> list[str]:
        """What looks say while the process takes this share of a CPU and gives no sign."""
        said = []
        for _ in range(round(seconds / every)):
            self.now += every
            self.cpu += share * every
            said.append(self.pulse.look())
        return [reason for reason in said if reason is not None]


def test_a_process_that_answers_is_alive_and_is_asked_again() -> None:
    process = Process()
    for _ in range(200):
        assert process.pulse.look() is None
        process.pulse.beat()
        process.now += 5
    assert process.asked == 200


def test_what_neither_answers_nor_computes_hangs() -> None:
    process = Process()
    assert process.look_for(30, 0.0) == []
    (reason,) = process.look_for(5, 0.0)
    assert "no sign of life" in reason
    assert process.asked == 1


def test_a_long_step_that_computes_is_no_hang() -> None:
    process = Process()
    # A twentieth of a CPU, as on a machine where many wait for it.
    assert process.look_for(590, 0.05) == []
    process.pulse.beat()
    assert process.look_for(590, 0.05) == []
    assert "one step has taken" in process.look_for(15, 0.05)[0]


def test_pauses_of_a_step_do_not_add_up() -> None:
    process = Process()
    for _ in range(10):
        assert process.look_for(25, 0.0) == []
        assert process.look_for(5, 0.5) == []


def test_a_looker_that_was_stopped_itself_blames_nobody() -> None:
    process = Process()
    process.pulse.look()
    process.now += 3600
    assert process.pulse.look() is None
    # Looks that follow each other at once, as from many health checks, are one.
    assert all(process.pulse.look() is None for _ in range(1000))


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A generator, a classifier and a bare encoder."""
    root = tmp_path_factory.mktemp("models")
    bare, classifier = write_encoder(root / "bare"), root / "classifier"
    AutoModelForSequenceClassification.from_pretrained(bare).save_pretrained(classifier)
    load_tokenizer(bare).save_pretrained(classifier)
    return {"generator": str(tiny_model), "bare": str(bare), "classifier": str(classifier)}


@pytest.fixture(scope="module")
def stopped(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A service over each model, whose engine process is stopped where it stands: a real hang."""
    values = {
        "run": {"name": "generator", "storage": str(tmp_path_factory.mktemp("runs"))},
        "model": {"path": models["generator"]},
        "serving": {
            "models": {name: {"path": path} for name, path in models.items() if name != "generator"},
            "request_seconds": SECONDS,
            "max_new_tokens": 32,
        },
    }
    config = validate(ServeConfig, values, "test")
    services: dict[str, Any] = {name: open_service(config, name, threads=1) for name in models}
    for service in services.values():
        os.kill(service.engine._process.pid, signal.SIGSTOP)
    yield services
    for service in services.values():
        service.engine._process.kill()
        service.engine.close()


def searcher(service: ModelService) -> Encoder:
    """What collections ask for vectors."""
    return Encoder(service.engine, service.tokenizer, "mean", 64, "tests", service.request_seconds)


def asked(kind: str, services: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    """One request of each kind."""
    generator: ModelService = services["generator"]
    completion = {"prompt": "the fox", "max_tokens": 4}
    return {
        "generate": lambda: complete(generator, CompletionRequest(**completion)),
        "echo": lambda: complete(generator, CompletionRequest(prompt=["the"] * 20, max_tokens=0, echo=True)),
        "logprobs": lambda: chat_logprobs(generator, [5, 6], [7, 8], 2),
        "embed": lambda: embed(generator, EmbeddingRequest(input=["the fox", "the dog"])),
        "embed by an encoder": lambda: embed(services["bare"], EmbeddingRequest(input="anna")),
        "classify": lambda: classify(services["classifier"], ClassifyRequest(input=["anna", "bert"])),
        "search": lambda: searcher(services["bare"]).vectors(["anna", "bert", "carl"]),
    }[kind]()


@pytest.mark.parametrize("kind", ["generate", "echo", "logprobs", "embed", "embed by an encoder", "classify", "search"])
def test_a_hung_engine_keeps_no_request_longer_than_it_may_take(kind: str, stopped: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(EngineTimeout, match=r"within 1\.5 s \(serving\.request_seconds\)"):
        asyncio.run(asyncio.wait_for(asked(kind, stopped), 20))
    assert time.monotonic() - began < SECONDS + 5
    engines = [service.engine for service in stopped.values()]
    assert all(engine.in_work == 0 for engine in engines)


def wait_until_hung(engine: Engine) -> str:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            engine.check()
        except EngineFailure as error:
            return str(error)
        time.sleep(0.3)
    pytest.fail("the engine was not found to hang")


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    engine = start_engine(str(tiny_model), ServingSection(), threads=1)
    engine.pulse.still = STILL
    yield engine
    engine._process.kill()
    engine.close()


def test_an_engine_at_work_stays_healthy(engine: Engine) -> None:
    """Idle, in steps, and idle again; many looks."""

    async def work() -> None:
        stream = engine.submit([5, 6, 7], SamplingParameters(200, temperature=0))
        async for _ in stream:
            engine.check()

    for _ in range(2):
        end = time.monotonic() + 1.5 * STILL
        while time.monotonic() < end:
            engine.check()
            time.sleep(0.2)
        asyncio.run(work())


def test_an_engine_that_hangs_becomes_unhealthy_and_ends(engine: Engine) -> None:
    """While a request waits; the request learns of it too."""

    async def ask() -> None:
        stream = engine.submit([5, 6, 7], SamplingParameters(50_000, temperature=0))
        await anext(aiter(stream))
        os.kill(engine._process.pid, signal.SIGSTOP)
        reason = await asyncio.to_thread(wait_until_hung, engine)
        assert "hung" in reason
        with pytest.raises(EngineFailure, match="hung"):
            async for _ in stream:
                pass
        with pytest.raises(EngineFailure, match="hung"):
            engine.submit([5], SamplingParameters(1))

    asyncio.run(ask())
    engine._process.wait(10)
    assert not psutil.pid_exists(engine._process.pid) or engine._process.returncode == -signal.SIGKILL


def test_an_idle_engine_that_is_stopped_is_found_too(stopped: dict[str, Any]) -> None:
    engine = stopped["bare"].engine
    engine.pulse.still = STILL
    assert engine.in_work == 0
    assert "hung" in wait_until_hung(engine)


def test_a_full_pipe_does_not_stop_the_event_loop(stopped: dict[str, Any]) -> None:
    """Long prompts to an engine that reads nothing: they wait in the replica, and can be taken back."""
    engine = stopped["generator"].engine

    async def ask() -> float:
        began = time.monotonic()
        streams = [engine.submit([5] * 100_000, SamplingParameters(1)) for _ in range(20)]
        for stream in streams:
            stream.cancel()
        await asyncio.sleep(0)
        return time.monotonic() - began

    assert asyncio.run(asyncio.wait_for(ask(), 20)) < 2
