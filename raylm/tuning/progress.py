"""What a running search shows: steps made by all trials, the best figure so far, and on a terminal the trials.

Read from the trials' own files, so that a search that was restored shows what its trials had made before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from raylm.config.tuning import TuningSection
from raylm.progress import ProgressBar
from raylm.tuning.results import Row, goodness, live_table

LOOK_SECONDS = 2.0
# Trials of which a terminal shows a line each.
MOST_LINES = 12


@dataclass(frozen=True)
class Look:
    """A search at a moment.

    Attributes:
        done: how many of what is counted there are by now.
        note: what else is to be said in a line.
        lines: what stands above the bar on a terminal.
    """

    done: int
    note: str
    lines: str = ""


class SearchProgress:
    """A bar over what all trials have done, used as a context manager around the search.

    Args:
        trials: how many there will be.
        unit: what is counted.
        look: how the search is now.
        total: of what is counted; None where it is not known.
    """

    def __init__(self, trials: int, unit: str, look: Callable[[], Look], total: int | None = None) -> None:
        self._look_at, self._latest = look, Look(0, "")
        self._bar = ProgressBar(
            f"tune, {trials} trial{'s' if trials != 1 else ''}", total, unit, above=lambda: self._latest.lines
        )
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
        # The table of the end is the stage's.
        self._latest = Look(self._latest.done, self._latest.note)
        self._bar.__exit__(kind, error, traceback)

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self._latest = self._look_at()
        self._bar.update(self._latest.done, self._latest.note)


def trained_so_far(rows: list[Row], trials: int, tuning: TuningSection) -> Look:
    """Steps that all trials have made, the best figure so far, and the trials, those that run first.

    Args:
        rows: of the trials that have begun.
        trials: how many there will be.
    """
    metric = str(tuning.metric)
    steps = sum(row["step"] or 0 for row in rows)
    note = f"{len(rows)} of {trials} trials begun" if rows else "starting the first trials"
    known = [row for row in rows if row[metric] is not None and row["status"] != "failed"]
    if known:
        best = min(known, key=lambda row: goodness(row, tuning))
        note += f", best {metric.replace('_', ' ')} {best[metric]:.4f} (trial {best['trial']})"
    table = live_table(rows, tuning).splitlines()
    hidden = len(table) - 1 - MOST_LINES
    lines = [*table[: MOST_LINES + 1], *([f"  and {hidden} more"] if hidden > 0 else [])]
    return Look(steps, note, "\n".join(lines) if rows else "")
