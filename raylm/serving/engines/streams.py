"""What came back for one request: a stream of generated ids, or one answer. Both live in the asker's event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from raylm.serving.engines.base import EngineFailure, EngineRefusal, Event, FinishReason

if TYPE_CHECKING:
    from raylm.serving.engines.client import Engine


class TokenStream:
    """Generated ids of one request, as an async iterator over what arrived since the last look.

    Attributes:
        finish_reason: ``stop`` (end token) or ``length``, once the stream has ended.
        generated: tokens that the engine gave, read or not.
        cached: tokens of the prompt that the engine had in its cache; None where it does not say.
        adapter: what the model has in this request.
    """

    def __init__(self, engine: Engine, number: int, adapter: str | None = None) -> None:
        self.adapter = adapter
        self.finish_reason: FinishReason | None = None
        self.generated = 0
        self.cached: int | None = None
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
        self.cached = event.cached if self.cached is None else self.cached
        self.finish_reason = event.finish_reason
        if event.error is not None:
            self._error = _failure_of(event)
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


class Answer:
    """The one result of a request that generates nothing."""

    def __init__(self, adapter: str | None = None) -> None:
        self.adapter = adapter
        self.generated = 0
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def _receive(self, event: Event) -> None:
        if self.future.done():
            return
        if event.error is not None:
            self.future.set_exception(_failure_of(event))
        else:
            self.future.set_result(event.result)


def _failure_of(event: Event) -> EngineFailure:
    return EngineRefusal(event.error) if event.refused else EngineFailure(event.error)


def receive_all(deliveries: list[tuple[TokenStream | Answer, Event]]) -> None:
    """Hand events to their askers; runs in the askers' event loop."""
    for asker, event in deliveries:
        asker._receive(event)
