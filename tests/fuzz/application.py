"""The HTTP application in this process, over tiny models and their real engines, and what watches it under a fuzz.

Counted are statuses; kept are answers of 500, log records with a traceback, stalls of the event loop, and memory.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import logging
import multiprocessing
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.serving.deploy.app import model_sources, open_service
from raylm.serving.deploy.models import Models
from raylm.serving.engines.base import EngineFailure
from raylm.serving.http.gate import Gate, Limits
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.routes import create_app
from raylm.serving.retrieval.opening import open_library
from tests.conftest import make_tiny_model
from tests.reading import write_encoder

# A stall is longer than this, and this process computed for as long: a machine that is busy with others is no stall.
STALL_SECONDS = 0.25
TOGETHER = 6
REQUEST_SECONDS = 120.0


@dataclass(frozen=True)
class Attack:
    """One request: its body is made in a process of its own, from its own random numbers."""

    route: str
    body: bytes
    method: str = "POST"
    what: str = ""


@dataclass
class Findings:
    """What was seen."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    errors: list[str] = field(default_factory=list)
    stalls: list[str] = field(default_factory=list)
    slow_machine: int = 0
    slowest: float = 0.0
    memory: list[tuple[float, float, float]] = field(default_factory=list)
    in_work: dict[int, str] = field(default_factory=dict)

    def report(self) -> bool:
        """Print everything; whether nothing was found."""
        print(f"requests: {sum(self.statuses.values())}, statuses: {dict(sorted(self.statuses.items()))}")
        print(f"slowest request: {self.slowest:.1f} s; moments when the machine gave no CPU: {self.slow_machine}")
        print("memory (s, MB here, MB of engines):", *(f"{t:.0f}:{own:.0f}+{rest:.0f}" for t, own, rest in self.memory))
        for name, found in (("stall", self.stalls), ("error", self.errors)):
            print(f"{name}s: {len(found)}")
            for text in found[:20]:
                print(f"  {name}: {text[:900]}")
        return not (self.stalls or self.errors)


class Records(logging.Handler):
    """Keeps what is logged with a traceback."""

    def __init__(self, findings: Findings) -> None:
        super().__init__(logging.WARNING)
        self._findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self._findings.errors.append("log: " + logging.Formatter().format(record)[-1200:])


def add_encoders(root: Path) -> dict[str, Any]:
    """A tiny reader, a classifier and an encoder on disk, as ``serving.models`` names them."""
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    from raylm.data.loading import load_tokenizer

    bare = write_encoder(root / "bare")
    for name, kind in (("reader", AutoModelForQuestionAnswering), ("classifier", AutoModelForSequenceClassification)):
        kind.from_pretrained(bare).save_pretrained(root / name)
        load_tokenizer(bare).save_pretrained(root / name)
    return {name: {"path": str(root / name)} for name in ("reader", "classifier", "bare")}


@contextlib.asynccontextmanager
async def application(*, encoders: bool, exported: bool) -> AsyncIterator[tuple[Gate, Models]]:
    """The application with the model ``tiny``; ``openvino`` and the encoders beside it where they are asked for."""
    root = Path(tempfile.mkdtemp(prefix="raylm-fuzz-"))
    model = make_tiny_model(root / "model")
    more = add_encoders(root) if encoders else {}
    if exported:
        from raylm.compression.exporters.openvino import export_model

        shutil.copytree(model, root / "exported")
        export_model(str(model), root / "exported" / "openvino")
        more["openvino"] = {"path": str(root / "exported"), "engine": "openvino"}
    values = {
        "run": {"name": "tiny", "storage": str(root / "runs")},
        "model": {"path": str(model)},
        "serving": {"models": more, "max_new_tokens": 32, "reading": {"sequence_length": 48, "overlap": 12}},
    }
    settings = validate(ServeConfig, values, "fuzz")
    metrics, library = ServerMetrics(export=False), open_library(settings, 1)
    models = Models([open_service(settings, name, 1, metrics) for name in model_sources(settings)])
    app = create_app(models, metrics, library)
    # As a replica does.
    gc.collect()
    gc.freeze()
    try:
        yield Gate(app, Limits.of(settings.serving), {}, metrics), models
    finally:
        for service in models.services:
            service.engine.close()
        models.services[0].schemas.close()
        shutil.rmtree(root)


class LoopWatch:
    """Notes when the event loop did not come round for long, and where it was then.

    A thread looks, as the loop cannot; where a call holds the interpreter's lock, it looks just after.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._beat, self._place = time.monotonic(), ""
        self._loop_thread = threading.get_ident()
        threading.Thread(target=self._look, daemon=True).start()

    async def beat(self) -> None:
        """Come round for ever; runs in the loop."""
        while True:
            began, computed = time.monotonic(), time.process_time()
            self._beat, self._place = began, ""
            await asyncio.sleep(0.01)
            lag, own = time.monotonic() - began - 0.01, time.process_time() - computed
            if lag > STALL_SECONDS:
                self._findings.slow_machine += own <= STALL_SECONDS
                if own > STALL_SECONDS:
                    doing = list(self._findings.in_work.values())
                    self._findings.stalls.append(f"{lag:.2f} s ({own:.2f} s computed) {self._place} during {doing}")

    def _look(self) -> None:
        while True:
            time.sleep(0.02)
            if time.monotonic() - self._beat > STALL_SECONDS * 0.6 and not self._place:
                frame = sys._current_frames().get(self._loop_thread)
                stack = traceback.extract_stack(frame)[-7:]
                self._place = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(stack))


async def watch_memory(findings: Findings, models: Models, began: float) -> None:
    """Note the memory of this process and of its engines, and engines that ended, every half minute."""
    process = psutil.Process()
    while True:
        rest = 0
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                rest += child.memory_info().rss
        findings.memory.append((time.monotonic() - began, process.memory_info().rss / 1e6, rest / 1e6))
        for service in models.services:
            try:
                await asyncio.to_thread(service.engine.check)
            except EngineFailure as error:
                findings.errors.append(f"{service.name}: {error}")
        await asyncio.sleep(30)


async def send(client: httpx.AsyncClient, attack: Attack, findings: Findings, name: str) -> None:
    """Send one request and note what is wrong with its answer."""
    began = time.monotonic()
    try:
        reply = await asyncio.wait_for(
            client.request(
                attack.method, attack.route, content=attack.body, headers={"content-type": "application/json"}
            ),
            REQUEST_SECONDS,
        )
    except TimeoutError:
        findings.errors.append(f"{name}: no answer within {REQUEST_SECONDS:g} s: {attack.what}")
        return
    findings.slowest = max(findings.slowest, time.monotonic() - began)
    findings.statuses[reply.status_code] += 1
    place = f"{name} {attack.method} {attack.route} {attack.what} {attack.body[:300]!r}"
    if reply.status_code >= 500 and reply.status_code != 503:
        findings.errors.append(f"{place}: {reply.status_code} {reply.text[:500]}")
    elif reply.status_code >= 400:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            message = reply.json()["error"]["message"]
            if len(message) > 2000 or "\n" in message.strip():
                findings.errors.append(f"{place}: not one clear line of {len(message)} characters: {message[:300]}")
            return
        findings.errors.append(f"{place}: {reply.status_code} without a message: {reply.text[:200]}")


def parse(description: str | None) -> argparse.Namespace:
    """The command line of a fuzz."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("minutes", type=float, help="how long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", type=int, help="send this one request again")
    return parser.parse_args()


async def fuzz(
    make: Callable[[random.Random], Attack], options: argparse.Namespace, *, encoders: bool, exported: bool
) -> bool:
    """Send what ``make`` makes until the time is over; whether nothing was found."""
    print(f"seed {options.seed}", flush=True)
    findings, loop = Findings(), asyncio.get_running_loop()
    # Bodies of megabytes are made elsewhere, so that only the application holds up the loop; forked before any thread.
    maker = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    maker.submit(int).result()
    logging.getLogger().addHandler(Records(findings))
    loop.set_exception_handler(
        lambda _, context: findings.errors.append(f"loop: {context.get('message')}: {context.get('exception')!r}")
    )
    numbers: Iterator[int] = iter(range(10**9)) if options.only is None else iter([options.only])
    async with application(encoders=encoders, exported=exported) as (app, models):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        began = time.monotonic()
        watchers = [
            asyncio.create_task(LoopWatch(findings).beat()),
            asyncio.create_task(watch_memory(findings, models, began)),
        ]

        async def work(place: int) -> None:
            for number in numbers:
                attack = await loop.run_in_executor(maker, make, random.Random(f"{options.seed}-{number}"))
                findings.in_work[place] = f"{number} {attack.route} {attack.what}"
                await send(client, attack, findings, f"--seed {options.seed} --only {number}")
                if time.monotonic() - began > options.minutes * 60:
                    return

        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
            done = await asyncio.gather(*map(work, range(TOGETHER)), return_exceptions=True)
            findings.errors += [f"worker: {error!r}" for error in done if isinstance(error, BaseException)]
            await send(client, Attack("/health", b"", "GET"), findings, "health")
        for watcher in watchers:
            watcher.cancel()
    maker.shutdown()
    return findings.report()


def run(make: Callable[[random.Random], Attack], description: str | None, *, encoders: bool, exported: bool) -> None:
    """Fuzz as the command line says; exit status 1 where something was found."""
    sys.exit(0 if asyncio.run(fuzz(make, parse(description), encoders=encoders, exported=exported)) else 1)
