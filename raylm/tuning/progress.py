"""What a running search shows: steps made by all trials, and the best validation loss so far.

Read from the trials' own metrics.jsonl, so that a search that was restored shows what its trials had made before.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from raylm.progress import ProgressBar
from raylm.training.metrics import read_metrics

LOOK_SECONDS = 2.0


class SearchProgress:
    """A bar over the steps of all trials, used as a context manager around the search.

    Args:
        directories: of the trials, by number; they need not be there yet.
    """

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories
        self._bar = ProgressBar(f"tune, {len(directories)} trials", None, "steps")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="raylm-search-progress", daemon=True)

    def __enter__(self) -> SearchProgress:
        self._bar.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self._bar.__exit__(kind, error, traceback)

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        steps, begun, best = 0, 0, (float("inf"), -1)
        for number, directory in enumerate(self._directories):
            lines = read_metrics(directory / "metrics.jsonl")
            if not lines:
                continue
            begun, steps = begun + 1, steps + lines[-1]["step"]
            found = [line["validation_loss"] for line in lines if "validation_loss" in line]
            best = min(best, *((loss, number) for loss in found)) if found else best
        note = f"{begun} of {len(self._directories)} trials begun" if begun else "starting the first trials"
        if best[1] >= 0:
            note += f", best validation loss {best[0]:.4f} (trial {best[1]})"
        self._bar.update(steps, note)
