"""The interface that every engine offers: prompt ids in, a stream of generated ids out.

The event loop submits and cancels; one thread per engine owns the model and advances all requests together. Between
the two run a queue of commands (to the thread) and, after each step, one callback (to the loop).
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]

# Below this, logits divided by the temperature may overflow: the likeliest token is taken.
LEAST_TEMPERATURE = 1e-3


class EngineFailure(Exception):
    """A request, or the whole engine, failed; the text says why."""


@dataclass(frozen=True)
class SamplingParameters:
    """How one request is decoded.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: sample from the smallest set of tokens whose probabilities sum to this; (0, 1].
        seed: of the request's own random numbers; the same seed draws the same tokens whatever runs beside it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < LEAST_TEMPERATURE


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine's start, and what it has in work now."""

    running: int
    waiting: int
    requests: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    generated_tokens: int


class TokenStream:
    """Generated ids of one request, as an async iterator over what arrived since the last look.

    Attributes:
        finish_reason: ``stop`` (end token) or ``length``, once the stream has ended.
    """

    def __init__(self, engine: Engine, number: int) -> None:
        self.finish_reason: FinishReason | None = None
        self._engine, self._number = engine, number
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._tokens: list[int] = []
        self._error: str | None = None

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> list[int]:
        while not self._tokens:
            if self._error is not None:
                raise EngineFailure(self._error)
            if self.finish_reason is not None:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        tokens, self._tokens = self._tokens, []
        return tokens

    def cancel(self) -> None:
        """Give the request's place free; what arrived and was not read is dropped. Harmless after the end."""
        if self.finish_reason is None and self._error is None:
            self._error, self._tokens = "cancelled", []
            self._engine._commands.put(_Cancel(self._number))

    def _receive(self, event: Event) -> None:
        """Take an event of the engine; runs in the event loop."""
        if self._error is None:
            self._tokens += event.tokens
            self.finish_reason, self._error = event.finish_reason, event.error
        self._arrived.set()


@dataclass(frozen=True)
class EngineRequest:
    """One request as the engine's thread sees it."""

    number: int
    prompt_ids: list[int]
    parameters: SamplingParameters
    stream: TokenStream


@dataclass
class Event:
    """What a step brought one request: ids, and at the end the reason or the error."""

    number: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        """Whether the request is over."""
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class _Submit:
    request: EngineRequest


@dataclass(frozen=True)
class _Cancel:
    number: int


@dataclass(frozen=True)
class _Close:
    pass


class Engine(abc.ABC):
    """Decodes many requests together on a thread of its own.

    A subclass says how a request joins (:meth:`_admit`), how all of them go one step further (:meth:`_advance`), and
    how one leaves early (:meth:`_drop`). These run on the engine's thread only.

    Args:
        sequences: requests decoded together; more wait their turn.
    """

    name: str

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self._commands: queue.SimpleQueue[_Submit | _Cancel | _Close] = queue.SimpleQueue()
        self._active: dict[int, EngineRequest] = {}
        self._numbers = itertools.count()
        self._submitted = self._finished = self._cancelled = self._failed = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"{self.name}-engine", daemon=True)

    @abc.abstractmethod
    def _admit(self, request: EngineRequest) -> None:
        """Let a request join; a RuntimeError or ValueError fails this request alone."""

    @abc.abstractmethod
    def _advance(self) -> list[Event]:
        """Go one step further with every request that has room."""

    @abc.abstractmethod
    def _drop(self, number: int) -> None:
        """Free what a request that was admitted and has not ended holds."""

    def start(self) -> None:
        """Start the thread; call once, when the model is loaded."""
        self._thread.start()

    def submit(self, prompt_ids: Sequence[int], parameters: SamplingParameters) -> TokenStream:
        """Queue a request; call from a running event loop.

        Args:
            prompt_ids: at least one token id.
            parameters: how to decode.

        Raises:
            EngineFailure: the engine has stopped.
        """
        if self._failure is not None:
            raise EngineFailure(self._failure)
        number = next(self._numbers)
        stream = TokenStream(self, number)
        self._submitted += 1
        self._prompt_tokens += len(prompt_ids)
        self._commands.put(_Submit(EngineRequest(number, list(prompt_ids), parameters, stream)))
        return stream

    def stats(self) -> EngineStats:
        """Counters and current load."""
        in_work = self._submitted - self._finished - self._cancelled - self._failed
        return EngineStats(
            running=min(in_work, self.sequences),
            waiting=max(0, in_work - self.sequences),
            requests=self._submitted,
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def check(self) -> None:
        """Raise :class:`EngineFailure` if the thread has died."""
        if self._failure is not None:
            raise EngineFailure(self._failure)

    def close(self) -> None:
        """Stop the thread; requests in work fail."""
        if self._thread.is_alive():
            self._commands.put(_Close())
            self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._deliver(self._advance())
        finally:
            # Also on an exception, which then goes on to the log: nobody may wait for a dead thread.
            error = sys.exc_info()[1]
            self._failure = f"the engine failed: {error}" if error else "the engine was stopped"
            while not self._commands.empty():
                command = self._commands.get()
                if isinstance(command, _Submit):
                    self._active[command.request.number] = command.request
            self._deliver([Event(number, error=self._failure) for number in self._active])

    def _take_commands(self) -> bool:
        """Do what the event loop asked for; wait for it while there is nothing in work. False to stop."""
        while not self._active or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Close):
                return False
            if isinstance(command, _Submit):
                self._join(command.request)
            elif self._active.pop(command.number, None) is not None:
                self._cancelled += 1
                self._drop(command.number)
        return True

    def _join(self, request: EngineRequest) -> None:
        self._active[request.number] = request
        try:
            self._admit(request)
        except (RuntimeError, ValueError) as error:
            self._deliver([Event(request.number, error=str(error))])

    def _deliver(self, events: list[Event]) -> None:
        """Hand events to their streams, with one wake-up of an event loop for all of them."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Event]]] = {}
        for event in events:
            request = self._active[event.number]
            loops.setdefault(request.stream._loop, []).append((request.stream, event))
            self._generated_tokens += len(event.tokens)
            if event.last:
                del self._active[event.number]
                self._finished += event.error is None
                self._failed += event.error is not None
        for loop, deliveries in loops.items():
            # A loop that has ended has nobody left who waits.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_receive_all, deliveries)


def _receive_all(deliveries: list[tuple[TokenStream, Event]]) -> None:
    for stream, event in deliveries:
        stream._receive(event)
