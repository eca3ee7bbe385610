"""Notices that this process, its node or the run is about to be stopped, which the loop answers with a checkpoint.

Sources: SIGTERM to a worker, Ray Train's word that a node is being drained, and the driver's wish on the board. Signal
handlers belong to the main thread, where Ray runs the actor, while training runs in a thread of it; Ray Train's backend
hook installs the handler there.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType

import ray.train
from ray.train.backend import BackendConfig
from ray.train.torch.config import TorchConfig, _TorchBackend

from raylm.training.health import HealthMonitor

# The loop asks about once a second; Ray Train looks for drained nodes every 5 s.
DRAIN_EVERY_CALLS = 5


class Notice(IntEnum):
    """What the loop does about it, from the mildest; the ranks agree on the greatest."""

    NONE = 0
    SAVE = 1
    """A node will be taken away: save, and go on until it is."""
    LEAVE = 2
    """A worker is being ended: save, then fail, so that Ray Train starts the workers anew."""
    STOP = 3
    """The run is to end: save and return."""


class SigtermFlag:
    """A signal handler that remembers; found again through ``signal.getsignal``, so that no global is needed."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def install_sigterm_flag() -> None:
    """Make SIGTERM a notice; only from the main thread."""
    signal.signal(signal.SIGTERM, SigtermFlag())


def sigterm_received() -> bool:
    """Whether this process was asked to end; from any thread."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, SigtermFlag) and handler.received


@contextlib.contextmanager
def sigterm_noticed() -> Iterator[None]:
    """SIGTERM is a notice within the block; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    install_sigterm_flag()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Notices:
    """All that one rank can be told, gathered; :meth:`current` is called by all ranks at the same steps.

    Args:
        health: the rank's monitor, which has the driver's wish from the board.
    """

    def __init__(self, health: HealthMonitor) -> None:
        self._health, self._calls, self._leaving = health, 0, False

    def current(self) -> Notice:
        """The greatest notice of this rank; every few calls a barrier across the workers."""
        if self._calls % DRAIN_EVERY_CALLS == 0 and not self._leaving:
            self._leaving = ray.train.get_preemption_info() is not None
        self._calls += 1
        if self._health.answer.stop is not None:
            return Notice.STOP
        if sigterm_received():
            return Notice.LEAVE
        return Notice.SAVE if self._leaving else Notice.NONE


class _Backend(_TorchBackend):
    def on_start(self, worker_group, backend_config: BackendConfig) -> None:
        worker_group.execute(install_sigterm_flag)
        super().on_start(worker_group, backend_config)


@dataclass
class NoticingTorchConfig(TorchConfig):
    """Ray Train's PyTorch backend whose workers notice SIGTERM."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The backend class that Ray Train instantiates."""
        return _Backend
