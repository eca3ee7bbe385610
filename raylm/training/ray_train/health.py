"""A rank's watch over itself and the others: signs of life, stack dumps, and what it failed with.

A thread beats on the board every few seconds. Where the board finds a rank silent (frozen, or stuck with the
interpreter's lock held), the others dump their stacks and die, and Ray Train restarts the workers. Where this rank
makes no step for as long as a collective may take, it dumps its own stacks, shortly before the time-out ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from raylm.errors import RunFailure, UserError
from raylm.training.ray_train.board import BeatReply, Failure, FailureKind

BEAT_SECONDS = 2.0
BOARD_TIMEOUT_SECONDS = 30.0
# Repeating these at once would fail again: disk full, quota, read-only, no permission, file too large.
FATAL_ERRNOS = frozenset({"ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG"})


def failure_kind(error: BaseException) -> FailureKind:
    """Whether ``error`` would come again, is this rank's own, or follows from another rank's."""
    import errno

    if isinstance(error, RunFailure | UserError):
        return "fatal"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in FATAL_ERRNOS:
        return "fatal"
    # Gloo raises RuntimeError with its own source path in the text.
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return "collective"
    return "own"


def failure_text(error: BaseException) -> str:
    """The error in one line."""
    name = "" if isinstance(error, RunFailure | UserError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())


class HealthMonitor:
    """Used as a context manager around a rank's training.

    Args:
        board: handle of the :class:`~raylm.training.ray_train.board.Board` actor, or None (a trial that trains alone).
        generation: token of this start of the workers.
        directory: where stacks and tracebacks go; made when there is something to write.
        patience_seconds: silence after which another rank counts as hung; None never.
        collective_seconds: the collectives' time-out.

    Attributes:
        answer: the board's latest answer.
        log: file of the stacks and tracebacks.
    """

    def __init__(
        self,
        board: Any,
        generation: str,
        rank: int,
        directory: Path,
        patience_seconds: float | None,
        collective_seconds: float,
    ) -> None:
        self.answer = BeatReply()
        self.log = directory / f"rank-{rank:05d}.txt"
        self._board, self._generation, self._rank = board, generation, rank
        self._patience = patience_seconds or float("inf")
        self._stall = max(1.0, collective_seconds - 2 * BEAT_SECONDS)
        self._step, self._progress_at, self._dumped = 0, time.monotonic(), False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="raylm-health", daemon=True)

    def __enter__(self) -> HealthMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._board is not None:
            self._board.leave.remote(self._generation, self._rank)

    def progress(self, step: int) -> None:
        """The rank has made ``step`` steps."""
        self._step, self._progress_at, self._dumped = step, time.monotonic(), False

    @property
    def step(self) -> int:
        """Steps that the rank has made."""
        return self._step

    def fail(self, error: BaseException) -> None:
        """Write the traceback of ``error`` to the log and tell the board."""
        self._write("".join(traceback.format_exception(error)))
        if self._board is not None:
            import ray

            failure = Failure(self._rank, failure_kind(error), failure_text(error), str(self.log), self._step)
            ray.get(self._board.fail.remote(failure), timeout=BOARD_TIMEOUT_SECONDS)

    def _write(self, text: str, *, stacks: bool = False) -> None:
        # A full or read-only disk must not hide what went wrong.
        with contextlib.suppress(OSError):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} step {self._step}\n{text}\n")
                stream.flush()
                if stacks:
                    faulthandler.dump_traceback(stream, all_threads=True)

    def dump_stacks(self, reason: str) -> None:
        """Append the stacks of all threads to the log."""
        self._write(reason, stacks=True)

    def _watch(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            if not self._dumped and time.monotonic() - self._progress_at > self._stall:
                self._dumped = True
                self.dump_stacks(f"no step for {self._stall:.0f} s; stacks of all threads:")
            if self._board is not None:
                self._beat()

    def _beat(self) -> None:
        import ray

        try:
            self.answer = ray.get(
                self._board.beat.remote(self._generation, self._rank, self._step, memory_bytes(), self._patience),
                timeout=BOARD_TIMEOUT_SECONDS,
            )
        except ray.exceptions.RayError:
            # Without the driver's board nobody can be judged; Ray itself ends orphaned workers.
            return
        for rank, step in self.answer.silent.items():
            text = f"no sign of life for {self._patience:g} s (hung or frozen); its last step was {step}"
            self.dump_stacks(f"rank {rank}: {text}; stacks of all threads of rank {self._rank}:")
            ray.get(
                self._board.fail.remote(Failure(rank, "own", text, str(self.log.parent), step)),
                timeout=BOARD_TIMEOUT_SECONDS,
            )
            # The training thread waits in a collective that no exception reaches.
            os._exit(1)


def memory_bytes() -> int:
    """Peak of allocated GPU memory where there is one, else resident memory of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
