"""Ctrl-C, SIGTERM and a closed terminal, the same for every command: one line, and the status that a shell gives them.

The command line holds :func:`interruptible` around everything. Work that ends in order, such as training, which saves
a checkpoint first, takes the first signal as a notice (:func:`deferred`). Nothing here is known to Ray or torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

# A shell's exit status of what a signal ended, less the signal's number.
SIGNALLED = 128
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One that comes sooner is the same request: timeout(1) signals a command, then its process group.
AGAIN_SECONDS = 0.5
INSIST_SECONDS = 1.0


def ending(number: signal.Signals) -> str:
    """The last line of a command that was ended."""
    return f"raylm: {'interrupted' if number == signal.SIGINT else f'ended by {number.name}'}"


class Interrupts:
    """A signal handler that raises KeyboardInterrupt; found again through ``signal.getsignal``, so that no global is
    needed. An exception of its own would not do: Ray makes a KeyboardInterrupt of it, as Typer does an exit.

    Attributes:
        received: the first signal, or None.
        at_once: end the process here and now instead.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at_once = False
        self._at = float("-inf")
        self._over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if self.at_once:
            # Not print(): the signal may have come in the middle of another one. A spinner has hidden the cursor.
            shown = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
            os.write(2, f"{shown}{ending(self.received)}\n".encode())
            os._exit(SIGNALLED + self.received)
        now, before = time.monotonic(), self._at
        if now - before > AGAIN_SECONDS:
            self._at = now
            raise KeyboardInterrupt

    def repeat(self, seconds: float = INSIST_SECONDS) -> None:
        """Raise again in a moment what was swallowed."""

        def kill() -> None:
            main = threading.main_thread().ident
            if self.received is not None and main is not None and not self._over:
                signal.pthread_kill(main, self.received)

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        """Nothing is repeated from here on."""
        self._over = True


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
    """Signals raise KeyboardInterrupt within the block; outside the main thread nothing changes.

    One that comes while Python runs a finalizer or a callback is swallowed there, with a traceback: it is repeated. So
    is a SIGTERM that Ray answers with an exit, while it starts.
    """
    handler, shown = Interrupts(), sys.unraisablehook

    def hook(found: sys.UnraisableHookArgs, /) -> None:
        if issubclass(found.exc_type, SystemExit):
            handler.received = handler.received or signal.SIGTERM
        if handler.received is not None and issubclass(found.exc_type, KeyboardInterrupt | SystemExit):
            handler.repeat()
        else:
            shown(found)

    with _handled_by(handler):
        sys.unraisablehook = hook
        try:
            yield handler
        finally:
            handler.end()
            sys.unraisablehook = shown


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """A signal ends the process within the block, which has nothing to put in order: libraries are imported, or read.

    Some of them import others under a bare ``except``, or are not to be used further once it was interrupted.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, Interrupts):
        yield
        return
    handler.at_once = True
    try:
        yield
    finally:
        handler.at_once = False


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
    """Repeat an interrupt until the block ends: the library that works in it swallows some."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, Interrupts):
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(INSIST_SECONDS):
            handler.repeat(0.0)

    threading.Thread(target=watch, name="raylm-insist", daemon=True).start()
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
