"""How fast an engine works, and so how long a text that comes now will wait for its turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# Tokens count for the rate with a weight that falls to 1/e in this many seconds.
MEMORY_SECONDS = 5.0
# A younger rate says nothing: the first tokens come after all prompts were read.
LEAST_SECONDS = 2.0
# Share of the newest text in the mean length of texts.
NEWEST_SHARE = 0.1


class Pace:
    """Tokens a second while there was something to do, and the mean length of texts; both from what came last.

    The rate is a mean with exponentially falling weights, corrected for having begun at zero (as in Adam, Kingma and Ba
    2015).

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._weighted, self._seen, self._began = 0.0, 0.0, math.inf
        self._length: float | None = None

    def begin(self) -> None:
        """Note that an idle engine has got work: what it did before says nothing about now."""
        self._weighted, self._seen = 0.0, self._clock()
        self._began = self._seen

    def tokens(self, count: int) -> None:
        """Note that ``count`` tokens came."""
        self._fade()
        self._weighted += count

    def finished(self, tokens: int) -> None:
        """Note that a text of ``tokens`` ended."""
        old = tokens if self._length is None else self._length
        self._length = old + NEWEST_SHARE * (tokens - old)

    def wait(self, texts: int) -> float:
        """Seconds until ``texts`` more have ended, as the last ones went; 0 while that cannot be known."""
        busy = self._clock() - self._began
        if not texts or self._length is None or busy < LEAST_SECONDS:
            return 0.0
        self._fade()
        rate = self._weighted / MEMORY_SECONDS / (1 - math.exp(-busy / MEMORY_SECONDS))
        return texts * self._length / rate if rate > 0 else 0.0

    def _fade(self) -> None:
        now = self._clock()
        self._weighted *= math.exp((self._seen - now) / MEMORY_SECONDS)
        self._seen = now
