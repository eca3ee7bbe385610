"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere.

Everything goes to stderr, so that what a stage prints on stdout stays its result.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType

PLAIN_LINE_SECONDS = 10.0
# Names a file that gets a JSON line a second at most: whoever started the command shows its progress in its own way.
FILE_VARIABLE = "RAYLM_PROGRESS_FILE"
FILE_LINE_SECONDS = 1.0


class ProgressBar:
    """A bar over ``total`` units of work, used as a context manager.

    Args:
        title: what is being done.
        total: units of work in all; None where that is not known.
        unit: name of the unit, for the rate.
        start: units already done, when work resumes.
    """

    def __init__(self, title: str, total: float | None, unit: str, start: float = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self._first = start
        self._bar = None
        self._task = None
        self._began = self._printed = 0.0
        self._file, self._written = os.environ.get(FILE_VARIABLE), float("-inf")

    def __enter__(self) -> ProgressBar:
        self._began = self._printed = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn(
                    "{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"
                    if self.total
                    else "{task.completed:,.0f} {task.fields[unit]}"
                ),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self.done, unit=self.unit, rate="", note=""
            )
        return self

    def update(self, done: float, note: str = "") -> None:
        """Set the units done so far, with a short ``note`` such as the latest loss."""
        self.done = done
        elapsed = max(1e-9, time.monotonic() - self._began)
        speed = (done - self._first) / elapsed
        rate = f"{speed:,.1f} {self.unit}/s"
        self._write_line(speed)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=rate, note=note)
        elif time.monotonic() - self._printed >= PLAIN_LINE_SECONDS:
            self._printed = time.monotonic()
            left = f", {(self.total - done) / speed:,.0f} s left" if self.total and speed > 0 else ""
            of = f"/{self.total:,.0f}" if self.total else ""
            print(
                f"{self.title}: {done:,.0f}{of} {self.unit}, {rate}{left} {note}".rstrip(), file=sys.stderr, flush=True
            )

    def _write_line(self, speed: float) -> None:
        finished = self.total is not None and self.done >= self.total
        if not self._file or (time.monotonic() - self._written < FILE_LINE_SECONDS and not finished):
            return
        self._written = time.monotonic()
        left = (self.total - self.done) / speed if self.total and speed > 0 else None
        line = {"title": self.title, "done": self.done, "total": self.total, "unit": self.unit, "seconds_left": left}
        with Path(self._file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
