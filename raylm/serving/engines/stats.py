"""What an engine counts, and what it has in work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Counts:
    """Counters since the engine's start, of the requests of one adapter or of none."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @classmethod
    def sum(cls, several: Iterable[Counts]) -> Counts:
        """All of them together."""
        total = cls()
        for counts in several:
            for key, value in vars(counts).items():
                setattr(total, key, getattr(total, key) + value)
        return total


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
