"""Engines that run while they are asked for: a replica of many models holds a few of them at a time.

Ray Serve's model multiplexing keeps the count and tells Serve's router which models a replica holds, so that requests
with the header ``serve_multiplexed_model_id`` go where their model already is. What it does not know is that an engine
has texts in work: one that has to go takes no more, finishes them, and ends then.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve

from raylm.serving.engines.base import EngineTimeout, Pooling, TokenScores
from raylm.serving.engines.client import Engine
from raylm.serving.engines.stats import EngineStats

DRAIN_LOOK_SECONDS = 0.02


class EnginePool:
    """At most ``most`` engines; a further one is started in place of that which was unused for longest.

    Args:
        most: engines at a time.
        seconds: longest that a request waits for its engine to start, and that an engine which has to go works on.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.seconds = seconds
        self._engines: dict[str, OnDemandEngine] = {}

        @serve.multiplexed(max_num_models_per_replica=most)
        async def start(name: str) -> _Running:
            return await self._engines[name]._start()

        self.start = start

    def engine(self, name: str, kind: str, start: Callable[[], Engine]) -> OnDemandEngine:
        """A model's engine, started when it is asked for.

        Args:
            name: of the model.
            kind: of the engine, for who asks before it runs.
            start: starts it and waits until it can be asked; called on a thread.
        """
        self._engines[name] = OnDemandEngine(self, name, kind, start)
        return self._engines[name]


class OnDemandEngine:
    """What a model asks in place of an :class:`~raylm.serving.engines.client.Engine` that always runs."""

    def __init__(self, pool: EnginePool, model: str, kind: str, start: Callable[[], Engine]) -> None:
        self.name = kind
        self._pool, self._model, self._starter = pool, model, start
        self._engine: Engine | None = None
        self._starting: asyncio.Task[Any] | None = None
        # Of the engines that have ended, and those that end now.
        self._past = EngineStats.nothing()
        self._ending: list[Engine] = []
        self._waiting = 0

    @property
    def loaded(self) -> bool:
        """Whether it runs."""
        return self._engine is not None

    async def open(self) -> Engine:
        """The engine, started where it does not run; who asks it must do so before awaiting anything else.

        Raises:
            EngineFailure: it cannot be started; says why.
            EngineTimeout: it did not start in time, or the others do not end.
        """
        end = asyncio.get_running_loop().time() + self._pool.seconds
        self._waiting += 1
        try:
            # Where it runs nothing is awaited; where it was started, others may have had their turn before this one.
            while self._engine is None:
                await self._wait_for_start(end)
        finally:
            self._waiting -= 1
        # Notes that it was used; awaits nothing either.
        await self._pool.start(self._model)
        return self._engine

    async def _wait_for_start(self, end: float) -> None:
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._pool.start(self._model))
            self._starting.add_done_callback(self._started)
        starting = self._starting
        # A client that leaves, or has waited long enough, does not take the engine from the others who wait for it.
        done, _ = await asyncio.wait({starting}, timeout=end - asyncio.get_running_loop().time())
        if not done:
            raise EngineTimeout(
                f"the model '{self._model}' was not loaded within {self._pool.seconds:g} s (serving.request_seconds)"
            )
        starting.result()

    def _started(self, task: asyncio.Task[Any]) -> None:
        self._starting = None
        # Those who wait have it; where all have left, nobody is to be told.
        if not task.cancelled():
            task.exception()

    async def _start(self) -> _Running:
        """What the pool calls when there is room."""
        self._engine = await asyncio.to_thread(self._starter)
        self.name = self._engine.name
        return _Running(self)

    async def _end(self) -> None:
        """Take no more, let the texts in work end, and end the engine."""
        engine, self._engine = self._engine, None
        assert engine is not None, "an engine ends once"
        self._ending.append(engine)
        end = asyncio.get_running_loop().time() + self._pool.seconds
        while engine.in_work and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        await asyncio.to_thread(engine.close)
        self._ending.remove(engine)
        self._past = self._past.plus(dataclasses.replace(engine.stats(), cache_usage=None, wait_seconds=0.0))

    async def score(self, ids: Sequence[int], top: int = 1) -> TokenScores:
        """As :meth:`Engine.score <raylm.serving.engines.client.Engine.score>`."""
        return await (await self.open()).score(ids, top)

    async def embed(self, ids: Sequence[int], pooling: Pooling) -> Any:
        """As :meth:`Engine.embed <raylm.serving.engines.client.Engine.embed>`."""
        return await (await self.open()).embed(ids, pooling)

    async def encode(self, ids: Sequence[int], types: Sequence[int] | None = None) -> Any:
        """As :meth:`Engine.encode <raylm.serving.engines.client.Engine.encode>`."""
        return await (await self.open()).encode(ids, types)

    def stats(self) -> EngineStats:
        """Counters since the replica's start, and current load; what waits for the engine's start counts as waiting."""
        engines = [*self._ending, *([self._engine] if self._engine else [])]
        stats = self._past
        for engine in engines:
            stats = stats.plus(engine.stats())
        return dataclasses.replace(stats, waiting=stats.waiting + self._waiting)

    def own_stats(self) -> EngineStats:
        """The same: engines that come and go have no adapters."""
        return self.stats()

    def check(self) -> None:
        """Raise :class:`~raylm.serving.engines.base.EngineFailure` if its process has died, or hangs."""
        # Another thread may end it meanwhile.
        if (engine := self._engine) is not None:
            engine.check()


class _Running:
    """A running engine as Serve's multiplexer holds it.

    To be rid of it, that calls its ``__del__``: here an attribute, which Python itself does not call.
    """

    def __init__(self, engine: OnDemandEngine) -> None:
        self.__del__ = engine._end
