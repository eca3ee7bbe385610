"""An engine as the texts of one adapter see it: the engine of the model below, asked for that adapter.

Both share places, cache and queue: what waits for the one waits for the other. Counters are each one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raylm.serving.engines.base import Pooling, SamplingParameters, TokenScores
from raylm.serving.engines.client import Engine
from raylm.serving.engines.stats import EngineStats
from raylm.serving.engines.streams import TokenStream


class AdaptedEngine:
    """What a served adapter asks in place of an :class:`~raylm.serving.engines.client.Engine`.

    Args:
        base: of the model that the adapter belongs to.
        adapter: its name there.
    """

    loaded = True

    def __init__(self, base: Engine, adapter: str) -> None:
        self.base, self.name, self._adapter = base, base.name, adapter

    async def open(self) -> AdaptedEngine:
        """Itself: the engine below runs."""
        return self

    def submit(self, prompt_ids: Sequence[int], parameters: SamplingParameters) -> TokenStream:
        """As :meth:`Engine.submit <raylm.serving.engines.client.Engine.submit>`."""
        return self.base.submit(prompt_ids, parameters, self._adapter)

    async def score(self, ids: Sequence[int], top: int = 1) -> TokenScores:
        """As :meth:`Engine.score <raylm.serving.engines.client.Engine.score>`."""
        return await self.base.score(ids, top, self._adapter)

    async def embed(self, ids: Sequence[int], pooling: Pooling) -> Any:
        """As :meth:`Engine.embed <raylm.serving.engines.client.Engine.embed>`."""
        return await self.base.embed(ids, pooling, self._adapter)

    async def encode(self, ids: Sequence[int], types: Sequence[int] | None = None) -> Any:
        """As :meth:`Engine.encode <raylm.serving.engines.client.Engine.encode>`, which refuses it here."""
        return await self.base.encode(ids, types)

    def stats(self) -> EngineStats:
        """Of the engine below: what is in its way is in this one's."""
        return self.base.stats()

    def own_stats(self) -> EngineStats:
        """Of this adapter's texts alone."""
        return self.base.own_stats(self._adapter)

    def check(self) -> None:
        """Nothing: the model below is checked, and this has no process of its own."""
