"""The replica's side of an engine: prompt ids in, a stream of generated ids out, and the process that decodes them.

The event loop submits and cancels; a thread reads the process's events and wakes the loop once for each list of them.
Tokens reach a reader in groups when many are streaming: each hand-over costs the HTTP side as much CPU as a few tokens
cost the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import raylm
from raylm.cluster.environment import inherited_environment, worker_environment
from raylm.config.serving import ServingSection
from raylm.serving.engines.base import (
    Cancel,
    Close,
    Command,
    Embed,
    Encode,
    EngineFailure,
    EngineRefusal,
    Event,
    FinishReason,
    Generate,
    Load,
    Pooling,
    Ready,
    SamplingParameters,
    Score,
    TokenScores,
)  # fmt: skip
from raylm.serving.engines.pace import Pace
from raylm.serving.engines.stats import EngineStats

# Seconds between two hand-overs to the same reader, for each request in work. One costs the HTTP side about a
# millisecond of a CPU: this keeps that near a tenth of one CPU, whatever the number of readers.
HAND_OVER_SECONDS = 0.008
LONGEST_HAND_OVER_SECONDS = 0.25
CLOSE_SECONDS = 5.0


class TokenStream:
    """Generated ids of one request, as an async iterator over what arrived since the last look.

    Attributes:
        finish_reason: ``stop`` (end token) or ``length``, once the stream has ended.
        generated: tokens that the engine gave, read or not.
    """

    def __init__(self, engine: Engine, number: int) -> None:
        self.finish_reason: FinishReason | None = None
        self.generated = 0
        self._engine, self._number = engine, number
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._tokens: list[int] = []
        self._error: EngineFailure | None = None
        # Ids that arrive before this time wait for it, the first ones for nothing.
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> list[int]:
        await self._arrived.wait()
        # A timer may wake a reader who has its tokens already: loops' clocks round, and timers come early.
        while not self._tokens and not self._ended:
            self._arrived.clear()
            await self._arrived.wait()
        if not self._tokens:
            if self._error is not None:
                raise self._error
            raise StopAsyncIteration
        tokens, self._tokens = self._tokens, []
        if not self._ended:
            self._arrived.clear()
            self._due = self._loop.time() + self._engine.hand_over_seconds
        return tokens

    def cancel(self, reason: EngineFailure | None = None) -> None:
        """Give the request's place free; what arrived and was not read is dropped. Harmless after the end.

        Args:
            reason: what a reader that still waits gets.
        """
        if not self._ended:
            self._error, self._tokens = reason or EngineFailure("cancelled"), []
            self._wake()
            self._engine._cancel(self._number)

    @property
    def _ended(self) -> bool:
        return self.finish_reason is not None or self._error is not None

    def _receive(self, event: Event) -> None:
        """Take an event of the engine; runs in the event loop."""
        if self._error is not None:
            return
        self._tokens += event.tokens
        self.finish_reason = event.finish_reason
        if event.error is not None:
            self._error = EngineRefusal(event.error) if event.refused else EngineFailure(event.error)
        # A reader that is awake already takes these as well. A timer set now would fire after it has: uvloop's timers
        # come up to a millisecond early.
        if self._ended or self._arrived.is_set() or self._loop.time() >= self._due:
            self._wake()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._wake)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._arrived.set()


class _Answer:
    """The one result of a request that generates nothing."""

    def __init__(self) -> None:
        self.generated = 0
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def _receive(self, event: Event) -> None:
        if self.future.done():
            return
        if event.error is not None:
            self.future.set_exception(EngineFailure(event.error))
        else:
            self.future.set_result(event.result)


class Engine:
    """A model that decodes many requests together in a process of its own.

    Args:
        connection: to the backend (:class:`~raylm.serving.engines.process.Decoding`).
        name: of the backend.
        sequences: requests decoded together; more wait their turn.
        process: the process behind the connection, ended by :meth:`close`.
    """

    def __init__(
        self, connection: Connection, name: str, sequences: int, process: subprocess.Popen | None = None
    ) -> None:
        self.name, self.sequences = name, sequences
        self._connection, self._process = connection, process
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, TokenStream | _Answer] = {}
        self._submitted = self._finished = self._cancelled = self._failed = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._cache_usage: float | None = None
        self._pace = Pace()
        self._failure: str | None = None
        self._reader = threading.Thread(target=self._read, name=f"{name}-engine", daemon=True)
        self._reader.start()

    async def open(self) -> Engine:
        """Itself: it runs."""
        return self

    @property
    def loaded(self) -> bool:
        """Whether it runs."""
        return True

    @property
    def in_work(self) -> int:
        """Requests that it has and has not answered."""
        return len(self._waiting)

    def submit(self, prompt_ids: Sequence[int], parameters: SamplingParameters) -> TokenStream:
        """Queue a request; call from a running event loop.

        Args:
            prompt_ids: at least one token id.
            parameters: how to decode.

        Raises:
            EngineFailure: the engine has stopped.
        """
        stream = TokenStream(self, next(self._numbers))
        self._enter(stream._number, stream, Generate(stream._number, list(prompt_ids), parameters), len(prompt_ids))
        return stream

    async def score(self, ids: Sequence[int], top: int = 1) -> TokenScores:
        """How likely each token of ``ids`` is after those before it, and which ``top`` tokens are likeliest there.

        Raises:
            EngineFailure: the text cannot be read, or the engine has stopped.
        """
        number = next(self._numbers)
        return await self._ask(Score(number, list(ids), top))

    async def embed(self, ids: Sequence[int], pooling: Pooling) -> Any:
        """The pooled last hidden states of ``ids``, a vector of length 1, fp32 [hidden size].

        Raises:
            EngineFailure: the text cannot be read, or the engine has stopped.
        """
        return await self._ask(Embed(next(self._numbers), list(ids), pooling))

    async def encode(self, ids: Sequence[int], types: Sequence[int] | None = None) -> Any:
        """What an encoder with a task says of ``ids``: scores fp32 [tokens, 2] of a reader, logits [labels] of a
        classifier.

        Raises:
            EngineFailure: the text cannot be read, or the engine has stopped.
        """
        return await self._ask(Encode(next(self._numbers), list(ids), None if types is None else list(types)))

    def stats(self) -> EngineStats:
        """Counters and current load."""
        in_work = self.in_work
        waiting = max(0, in_work - self.sequences)
        return EngineStats(
            running=min(in_work, self.sequences),
            waiting=waiting,
            requests=self._submitted,
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cache_usage=self._cache_usage,
            # It is its turn when those before it wait no more and one of those in work has ended.
            wait_seconds=self._pace.wait(waiting + 1) if in_work >= self.sequences else 0.0,
        )

    @property
    def hand_over_seconds(self) -> float:
        """Least seconds between two groups of tokens to the same reader."""
        return min(LONGEST_HAND_OVER_SECONDS, HAND_OVER_SECONDS * min(self.in_work, self.sequences))

    def check(self) -> None:
        """Raise :class:`EngineFailure` if the process has died."""
        if self._failure is not None:
            raise EngineFailure(self._failure)

    def close(self) -> None:
        """End the process; requests in work fail."""
        with contextlib.suppress(OSError):
            self._send(Close())
        if self._process is not None:
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(CLOSE_SECONDS)
        self._connection.close()

    async def _ask(self, command: Score | Embed | Encode) -> Any:
        answer = _Answer()
        self._enter(command.number, answer, command, len(command.ids))
        try:
            return await answer.future
        except asyncio.CancelledError:
            self._cancel(command.number)
            raise

    def _enter(self, number: int, asker: TokenStream | _Answer, command: Command, prompt_tokens: int) -> None:
        self.check()
        if not self._waiting:
            self._pace.begin()
        self._waiting[number] = asker
        self._submitted += 1
        self._prompt_tokens += prompt_tokens
        # If the process is gone, the reader thread knows why, and fails this request with the others.
        with contextlib.suppress(OSError):
            self._send(command)

    def _cancel(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None:
            self._cancelled += 1
            with contextlib.suppress(OSError):
                self._send(Cancel(number))

    def _send(self, command: Command) -> None:
        with self._sending:
            self._connection.send(command)

    def _read(self) -> None:
        """Hand events to their askers until the process is gone; runs on a thread."""
        reason = "the engine was stopped"
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, EngineFailure):
                    reason = f"the engine failed: {message}"
                elif isinstance(message, Load):
                    self._cache_usage = message.cache_usage
                else:
                    self._deliver(message)
        except (EOFError, OSError):
            if self._process is not None and (status := self._process.poll()):
                reason = f"the engine's process ended with status {status}"
        self._failure = reason
        self._deliver([Event(number, error=reason) for number in list(self._waiting)])

    def _deliver(self, events: list[Event]) -> None:
        """Hand events over, with one wake-up of an event loop for all of them."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream | _Answer, Event]]] = {}
        for event in events:
            asker = self._waiting.get(event.number)
            # What was cancelled may have taken one more step.
            if asker is None:
                continue
            loops.setdefault(asker._loop, []).append((asker, event))
            self._generated_tokens += len(event.tokens)
            asker.generated += len(event.tokens)
            self._pace.tokens(len(event.tokens))
            if event.finish_reason is not None:
                self._pace.finished(asker.generated)
            if event.last and self._waiting.pop(event.number, None) is not None:
                self._finished += event.error is None
                self._failed += event.error is not None
        for loop, deliveries in loops.items():
            # A loop that has ended has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_receive_all, deliveries)


def start_engine(source: str, serving: ServingSection, *, threads: int, task: str = "causal") -> Engine:
    """Start a process that loads the model, and wait until it can be asked.

    Args:
        source: Hugging Face directory or hub name.
        serving: limits and the choice of engine.
        threads: threads that the model computes with.
        task: the model's (:data:`raylm.config.tasks.TASKS`).

    Raises:
        EngineFailure: the model could not be loaded; says why.
    """
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "raylm.serving.engines.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=inherited_environment() | worker_environment(threads) | {"PYTHONPATH": _module_path()},
        )
    try:
        ours.send((source, serving, threads, task))
        message = ours.recv()
    except (EOFError, OSError):
        raise EngineFailure(f"the engine's process ended with status {process.wait()} while loading {source}") from None
    if not isinstance(message, Ready):
        process.wait()
        raise message
    return Engine(ours, message.name, serving.max_concurrent_requests, process)


def _module_path() -> str:
    """Where a new interpreter finds raylm: Ray may have put a job's directory on this one's path alone."""
    root = str(Path(raylm.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def _receive_all(deliveries: list[tuple[TokenStream | _Answer, Event]]) -> None:
    for asker, event in deliveries:
        asker._receive(event)
