"""The replica's side of an engine: prompt ids in, a stream of generated ids out, and the process that decodes them.

The event loop submits and cancels; a thread reads the process's events and wakes the loop once for each list of them.
Another one writes: a pipe that is full, as the engine is in a long step or hangs, must not stop the loop.
Tokens reach a reader in groups when many are streaming: each hand-over costs the HTTP side as much CPU as a few tokens
cost the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from raylm.cluster.environment import inherited_environment, worker_environment
from raylm.config.serving import ServingSection
from raylm.serving.engines.base import (
    Alive,
    Cancel,
    Close,
    Command,
    Embed,
    Encode,
    EngineFailure,
    Event,
    Generate,
    Load,
    Ping,
    Pooling,
    Ready,
    SamplingParameters,
    Score,
    TokenScores,
)  # fmt: skip
from raylm.serving.engines.liveness import Pulse, family_cpu_seconds, kill_family
from raylm.serving.engines.pace import Pace
from raylm.serving.engines.stats import Counts, EngineStats
from raylm.serving.engines.streams import Answer, TokenStream, receive_all
from raylm.serving.helper_process import module_path

# Seconds between two hand-overs to the same reader, for each request in work. One costs the HTTP side about a
# millisecond of a CPU: this keeps that near a tenth of one CPU, whatever the number of readers.
HAND_OVER_SECONDS = 0.008
LONGEST_HAND_OVER_SECONDS = 0.25
CLOSE_SECONDS = 5.0
# A step that computes longer than a text may take helps nobody, but a short serving.request_seconds is no reason to end
# an engine that reads a long prompt.
LEAST_LONGEST_STEP = 600.0


class Engine:
    """A model that decodes many requests together in a process of its own.

    Args:
        connection: to the backend (:class:`~raylm.serving.engines.process.Decoding`).
        name: of the backend.
        sequences: requests decoded together; more wait their turn.
        process: the process behind the connection, ended by :meth:`close`.
        longest_step: seconds after which a process that answers nothing hangs, even if it computes.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        sequences: int,
        process: subprocess.Popen | None = None,
        longest_step: float = math.inf,
    ) -> None:
        self.name, self.sequences = name, sequences
        self._connection, self._process = connection, process
        self._numbers = itertools.count()
        self._waiting: dict[int, TokenStream | Answer] = {}
        # By the adapter of a request.
        self._counts: dict[str | None, Counts] = {None: Counts()}
        self._cache_usage: float | None = None
        self._pace = Pace()
        self._failure: str | None = None
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.pulse: Pulse | None = None
        if process is not None:
            cpu_seconds = functools.partial(family_cpu_seconds, process.pid)
            self.pulse = Pulse(lambda: self._send(Ping()), cpu_seconds, longest_step)
        self._reader = threading.Thread(target=self._read, name=f"{name}-engine", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"{name}-commands", daemon=True)
        self._reader.start()
        self._writer.start()

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

    def submit(
        self, prompt_ids: Sequence[int], parameters: SamplingParameters, adapter: str | None = None
    ) -> TokenStream:
        """Queue a request; call from a running event loop.

        Args:
            prompt_ids: at least one token id.
            parameters: how to decode.
            adapter: name of the one that the model is to have, here and below.

        Raises:
            EngineFailure: the engine has stopped.
        """
        stream = TokenStream(self, next(self._numbers), adapter)
        command = Generate(stream._number, list(prompt_ids), parameters, adapter)
        self._enter(stream._number, stream, command, len(prompt_ids))
        return stream

    async def score(self, ids: Sequence[int], top: int = 1, adapter: str | None = None) -> TokenScores:
        """How likely each token of ``ids`` is after those before it, and which ``top`` tokens are likeliest there.

        Raises:
            EngineFailure: the text cannot be read, or the engine has stopped.
        """
        number = next(self._numbers)
        return await self._ask(Score(number, list(ids), top, adapter))

    async def embed(self, ids: Sequence[int], pooling: Pooling, adapter: str | None = None) -> Any:
        """The pooled last hidden states of ``ids``, a vector of length 1, fp32 [hidden size].

        Raises:
            EngineFailure: the text cannot be read, or the engine has stopped.
        """
        return await self._ask(Embed(next(self._numbers), list(ids), pooling, adapter))

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
        running = min(in_work, self.sequences)
        return self._stats(running, in_work - running, Counts.sum(self._counts.values()))

    def own_stats(self, adapter: str | None = None) -> EngineStats:
        """Counters and current load of the requests of one adapter, or of none."""
        # Requests begin in their order.
        asked = [asker.adapter == adapter for asker in list(self._waiting.values())]
        running = sum(asked[: self.sequences])
        return self._stats(running, sum(asked) - running, self._counts.get(adapter, Counts()))

    def _stats(self, running: int, waiting: int, counts: Counts) -> EngineStats:
        # It is its turn when those before it wait no more and one of those in work has ended.
        in_work = self.in_work
        before = max(0, in_work - self.sequences) + 1
        wait = self._pace.wait(before) if in_work >= self.sequences else 0.0
        return EngineStats(
            running=running, waiting=waiting, cache_usage=self._cache_usage, wait_seconds=wait, **vars(counts)
        )

    @property
    def hand_over_seconds(self) -> float:
        """Least seconds between two groups of tokens to the same reader."""
        return min(LONGEST_HAND_OVER_SECONDS, HAND_OVER_SECONDS * min(self.in_work, self.sequences))

    def check(self) -> None:
        """Raise :class:`EngineFailure` if the process has died or hangs; to be called every few seconds.

        One that hangs is killed: those who wait learn of it at once, and it cannot outlive its replica.
        """
        if self._failure is None and self.pulse is not None and (reason := self.pulse.look()) is not None:
            self._failure = f"the engine hung: {reason}"
            kill_family(self._process.pid)
        self._check_alive()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineFailure(self._failure)

    def close(self) -> None:
        """End the process; requests in work fail."""
        self._send(Close())
        if self._process is not None:
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(CLOSE_SECONDS)
        self._outbox.put(None)
        self._writer.join(CLOSE_SECONDS)
        self._connection.close()

    async def _ask(self, command: Score | Embed | Encode) -> Any:
        answer = Answer(getattr(command, "adapter", None))
        self._enter(command.number, answer, command, len(command.ids))
        try:
            return await answer.future
        except asyncio.CancelledError:
            self._cancel(command.number)
            raise

    def _enter(self, number: int, asker: TokenStream | Answer, command: Command, prompt_tokens: int) -> None:
        self._check_alive()
        if not self._waiting:
            self._pace.begin()
        self._waiting[number] = asker
        counts = self._counts.setdefault(asker.adapter, Counts())
        counts.requests += 1
        counts.prompt_tokens += prompt_tokens
        self._send(command)
        # The engine may have ended since the check, after those who waited then were told.
        if self._failure is not None:
            self._deliver([Event(number, error=self._failure)])

    def _cancel(self, number: int) -> None:
        if (asker := self._waiting.pop(number, None)) is not None:
            self._counts[asker.adapter].cancelled += 1
            self._send(Cancel(number))

    def _send(self, command: Command) -> None:
        self._outbox.put(command)

    def _write(self) -> None:
        """Hand commands to the process until the engine is closed; runs on a thread."""
        while (command := self._outbox.get()) is not None:
            # If the process is gone, the reader thread knows why, and fails this request with the others.
            with contextlib.suppress(OSError):
                self._connection.send(command)

    def _read(self) -> None:
        """Hand events to their askers until the process is gone; runs on a thread."""
        reason = "the engine was stopped"
        try:
            while True:
                message = self._connection.recv()
                if self.pulse is not None:
                    self.pulse.beat()
                if isinstance(message, EngineFailure):
                    reason = f"the engine failed: {message}"
                elif isinstance(message, Load):
                    self._cache_usage = message.cache_usage
                elif not isinstance(message, Alive):
                    self._deliver(message)
        except (EOFError, OSError):
            if self._process is not None and (status := self._process.poll()):
                reason = f"the engine's process ended with status {status}"
        self._failure = self._failure or reason
        self._deliver([Event(number, error=self._failure) for number in list(self._waiting)])

    def _deliver(self, events: list[Event]) -> None:
        """Hand events over, with one wake-up of an event loop for all of them."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream | Answer, Event]]] = {}
        for event in events:
            asker = self._waiting.get(event.number)
            # What was cancelled may have taken one more step.
            if asker is None:
                continue
            loops.setdefault(asker._loop, []).append((asker, event))
            counts = self._counts[asker.adapter]
            counts.generated_tokens += len(event.tokens)
            asker.generated += len(event.tokens)
            self._pace.tokens(len(event.tokens))
            if event.finish_reason is not None:
                self._pace.finished(asker.generated)
            if event.last and self._waiting.pop(event.number, None) is not None:
                counts.finished += event.error is None
                counts.failed += event.error is not None
        for loop, deliveries in loops.items():
            # A loop that has ended has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(receive_all, deliveries)


def start_engine(
    source: str, serving: ServingSection, *, threads: int, task: str = "causal", trusted: bool = False
) -> Engine:
    """Start a process that loads the model, and wait until it can be asked.

    Args:
        source: Hugging Face directory or hub name.
        serving: limits and the choice of engine.
        threads: threads that the model computes with.
        task: the model's (:data:`raylm.config.tasks.TASKS`).
        trusted: whether code of the model's own may be imported.

    Raises:
        EngineFailure: the model could not be loaded; says why.
    """
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "raylm.serving.engines.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=inherited_environment() | worker_environment(threads) | {"PYTHONPATH": module_path()},
        )
    try:
        ours.send((source, serving, threads, task, trusted))
        message = ours.recv()
    except (EOFError, OSError):
        raise EngineFailure(f"the engine's process ended with status {process.wait()} while loading {source}") from None
    if not isinstance(message, Ready):
        process.wait()
        raise message
    longest_step = max(serving.request_seconds, LEAST_LONGEST_STEP)
    return Engine(ours, message.name, serving.max_concurrent_requests, process, longest_step)
