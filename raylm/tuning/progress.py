"""What a running search shows: steps made by all trials, and the best validation loss so far.

Read from the trials' own metrics.jsonl, so that a search that was restored shows what its trials had made before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from raylm.progress import ProgressBar
from raylm.training.reports.metrics import read_metrics

LOOK_SECONDS = 2.0


class SearchProgress:
    """A bar over what all trials have done, used as a context manager around the search.

    Args:
        trials: how many there will be.
        unit: what is counted.
        look: how many of these there are by now, and what else is to be said.
        total: of these; None where it is not known.
    """

    def __init__(self, trials: int, unit: str, look: Callable[[], tuple[int, str]], total: int | None = None) -> None:
        self._look_at = look
        self._bar = ProgressBar(f"tune, {trials} trials", total, unit)
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
        self._bar.update(*self._look_at())


def trained_steps(directory: Path, trials: int) -> tuple[int, str]:
    """Steps that all trials have made, and the best validation loss so far.

    Args:
        directory: of the trials; it need not be there yet.
        trials: how many there will be.
    """
    steps, begun, best = 0, 0, (float("inf"), "")
    for path in sorted(directory.glob("*/metrics.jsonl")):
        lines, name = read_metrics(path), path.parent.name
        if not lines:
            continue
        begun, steps = begun + 1, steps + lines[-1]["step"]
        found = [line["validation_loss"] for line in lines if "validation_loss" in line]
        best = min(best, *((loss, name) for loss in found)) if found else best
    note = f"{begun} of {trials} trials begun" if begun else "starting the first trials"
    return steps, f"{note}, best validation loss {best[0]:.4f} ({best[1]})" if best[1] else note
