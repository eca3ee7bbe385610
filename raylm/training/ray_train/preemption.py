"""Notices that this process, its node or the run is about to be stopped, which the loop answers with a checkpoint.

Sources: SIGTERM to a worker, Ray Train's word that a node is being drained, and the driver's wish on the board. Signal
handlers belong to the main thread, where Ray runs the actor, while training runs in a thread of it; Ray Train's backend
hook installs the handler there.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any

import ray.train
from ray.train.backend import BackendConfig
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2._internal.execution.callback import ControllerCallback

from raylm.training.ray_train.health import HealthMonitor

# The loop asks about once a second; Ray Train looks for drained nodes every 5 s.
DRAIN_EVERY_CALLS = 5
SAVE_SECONDS = 30.0


class Notice(IntEnum):
    """What the loop does about it, from the mildest; the ranks agree on the greatest."""

    NONE = 0
    SAVE = 1
    """A node will be taken away, or the number of workers will change: save, and go on until it does."""
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


class Notices:
    """All that one rank can be told, gathered; :meth:`current` is called by all ranks at the same steps.

    Args:
        health: the rank's monitor, which has the driver's wishes from the board.

    Attributes:
        asked: requests for a checkpoint that :meth:`current` has passed on.
    """

    def __init__(self, health: HealthMonitor, rank: int) -> None:
        self._health, self._rank, self._calls, self._leaving = health, rank, 0, False
        self.asked = health.answer.asked

    def current(self) -> Notice:
        """The greatest new notice of this rank; every few calls a barrier across the workers."""
        answer, found = self._health.answer, Notice.NONE
        if self._calls % DRAIN_EVERY_CALLS == 0 and not self._leaving:
            self._leaving = ray.train.get_preemption_info() is not None
            if self._leaving:
                found = Notice.SAVE
        self._calls += 1
        # The ranks hear of a request at different times; rank 0 speaks for all.
        if answer.asked > self.asked and self._rank == 0:
            self.asked, found = answer.asked, Notice.SAVE
        if answer.stop is not None:
            return Notice.STOP
        return Notice.LEAVE if sigterm_received() else found


class SaveBeforeResize(ControllerCallback):
    """Has the workers save before Ray Train replaces them by more or fewer; runs in Ray Train's controller.

    Args:
        board: handle of the run's board.
    """

    def __init__(self, board: Any) -> None:
        self._board, self._running = board, False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Wait for a checkpoint, but not for ever: the resize goes on in any case."""
        running, self._running = self._running, True
        if not running:
            return
        request = ray.get(self._board.ask_to_save.remote(), timeout=SAVE_SECONDS)
        deadline = time.monotonic() + SAVE_SECONDS
        while time.monotonic() < deadline:
            if ray.get(self._board.saved.remote(), timeout=SAVE_SECONDS) >= request:
                return
            time.sleep(0.2)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """After a failure nobody is left to save."""
        self._running = False


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
