"""Ctrl-C, SIGTERM and a closed terminal, the same for every command: one line, and the status that a shell gives them.

The command line holds :func:`interruptible` around everything. Work that ends in order, such as training, which saves
a checkpoint first, takes the first signal as a notice (:func:`deferred`). Nothing here is known to Ray or torch.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One that comes sooner is the same request: timeout(1) signals a command, then its process group.
AGAIN_SECONDS = 0.5
INSIST_SECONDS = 1.0


class Interrupts:
    """A signal handler that raises KeyboardInterrupt; found again through ``signal.getsignal``, so that no global is
    needed. An exception of its own would not do: Ray makes a KeyboardInterrupt of it, as Typer does an exit.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = float("-inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        now, before = time.monotonic(), self._at
        if now - before > AGAIN_SECONDS:
            self._at = now
            raise KeyboardInterrupt


class Deferred:
    """A signal handler that takes the first signal as a notice, and hands the second on.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[int, signal._HANDLER] = {}
        self._at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._at > AGAIN_SECONDS:
            if callable(before := self.before.get(number)):
                before(number, frame)
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Signals raise KeyboardInterrupt within the block; outside the main thread nothing changes."""
    handler = Interrupts()
    with _handled_by(handler):
        yield handler


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
    """The first signal is a notice within the block, and raised at its end; the second ends the block at once.

    A failure of the block comes before the signal. Outside the main thread nothing changes.
    """
    handler = Deferred()
    interrupted = False
    with _handled_by(handler) as handler.before:
        try:
            yield handler
        except KeyboardInterrupt:
            interrupted = True
    if handler.received is not None:
        signal.raise_signal(handler.received)
    if interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def insistent() -> Iterator[None]:
    """Repeat an interrupt until the block ends: some libraries import others under a bare ``except``."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, Interrupts) or threading.current_thread() is not threading.main_thread():
        yield
        return
    done, main = threading.Event(), threading.main_thread().ident
    assert main is not None

    def repeat() -> None:
        while not done.wait(INSIST_SECONDS):
            if handler.received is not None:
                signal.pthread_kill(main, handler.received)

    threading.Thread(target=repeat, name="raylm-insist", daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def _handled_by(handler: Interrupts | Deferred) -> Iterator[dict[int, signal._HANDLER]]:
    """``handler`` on all signals that are not ignored; gives what was there before."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    # nohup ignores SIGHUP, and a shell SIGINT for what it runs in the background.
    before = {number: found for number in SIGNALS if (found := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, found in before.items():
            signal.signal(number, found)
