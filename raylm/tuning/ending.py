"""How a search ends when it is asked to: Ray Tune saves it first, and the same command goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

from raylm.interrupts import Deferred

WATCH_SECONDS = 0.2


@contextlib.contextmanager
def ended_in_order(signals: Deferred) -> Iterator[None]:
    """Have Ray Tune save the search and end it when a signal is noticed; it goes on with the same command.

    Ray Tune itself takes SIGINT for the user's wish to have the results so far, which are none of a whole search. What
    it does then it does on SIGUSR1 as well, from the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            # Before Ray Tune is there to take it, it would end the process.
            if signals.received is not None and signal.getsignal(signal.SIGUSR1) is not before:
                logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
                text = "saving the search, then ending; Ctrl-C once more ends at once"
                print(f"tune: {text}", file=sys.stderr, flush=True)
                signal.raise_signal(signal.SIGUSR1)
                return

    before = signal.getsignal(signal.SIGUSR1)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    watcher = threading.Thread(target=watch, name="raylm-search-end", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
