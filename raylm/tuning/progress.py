"""What a running search shows: steps made by all trials, and the best validation loss so far.

Read from the trials' own metrics.jsonl, so that a search that was restored shows what its trials had made before.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from raylm.progress import ProgressBar
from raylm.training.reports.metrics import read_metrics

LOOK_SECONDS = 2.0


class SearchProgress:
    """A bar over the steps of all trials, used as a context manager around the search.

    Args:
        directory: of the trials; it need not be there yet.
        trials: how many there will be.
    """

    def __init__(self, directory: Path, trials: int) -> None:
        self._directory, self._trials = directory, trials
        self._bar = ProgressBar(f"tune, {trials} trials", None, "steps")
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
        steps, begun, best = 0, 0, (float("inf"), "")
        for path in sorted(self._directory.glob("*/metrics.jsonl")):
            lines, name = read_metrics(path), path.parent.name
            if not lines:
                continue
            begun, steps = begun + 1, steps + lines[-1]["step"]
            found = [line["validation_loss"] for line in lines if "validation_loss" in line]
            best = min(best, *((loss, name) for loss in found)) if found else best
        note = f"{begun} of {self._trials} trials begun" if begun else "starting the first trials"
        if best[1]:
            note += f", best validation loss {best[0]:.4f} ({best[1]})"
        self._bar.update(steps, note)
