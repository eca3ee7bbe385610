"""Time that a device spends on something, added up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up what is done within :meth:`measure`.

    A GPU works behind the process that feeds it, so that its time is taken from events in its stream, which nothing
    waits for before :meth:`seconds`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count what happens inside."""
        if self._on_gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """All of it since the last call."""
        if self._events:
            torch.cuda.synchronize()
        total = self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return total
