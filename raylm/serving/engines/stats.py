"""What an engine counts, and what it has in work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


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
    cache_usage: float | None
    """Share of the key-value cache in use, 0 to 1; None where the engine does not say."""
    wait_seconds: float
    """How long a text that comes now will wait for its turn, as the last ones went; 0 while that is unknown."""

    @classmethod
    def nothing(cls) -> EngineStats:
        """Those of an engine that was never asked."""
        return cls(0, 0, 0, 0, 0, 0, 0, 0, None, 0.0)

    def plus(self, later: EngineStats) -> EngineStats:
        """Both engines' counters and work; cache and wait are the ``later`` one's."""
        counts = {key: value + getattr(later, key) for key, value in vars(self).items() if isinstance(value, int)}
        return dataclasses.replace(later, **counts)
