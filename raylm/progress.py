"""What a stage is doing, on stderr: a spinner or a bar on a terminal, plain lines elsewhere.

:class:`Activity` is for work whose length is not known, :class:`ProgressBar` for work that is counted. Both say
something at once and then at least every ten seconds, so that nobody has to guess whether a stage hangs. stdout is
left to a stage's result. Nothing heavy is imported here: the first line comes before torch and ray do.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

PLAIN_LINE_SECONDS = 10.0
# Names a file that gets a JSON line a second at most: whoever started the command shows its progress in its own way.
FILE_VARIABLE = "RAYLM_PROGRESS_FILE"
FILE_LINE_SECONDS = 1.0
# Counted work that took no longer needs no line about its end.
SHORT_SECONDS = 2.0


class Activity:
    """One thing that a stage does, used as a context manager; not inside another activity or a bar.

    Args:
        text: what is being done: ``"starting Ray"``.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._began = 0.0
        self._spinner: Any = None
        self._ticker: _Ticker | None = None
        self._task: Any = None

    def __enter__(self) -> Activity:
        self._began = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._spinner = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._spinner.start()
            self._task = self._spinner.add_task(self.text, total=None)
        else:
            print_line(f"{self.text}…")
            self._ticker = _Ticker(lambda: f"{self.text}… {time.monotonic() - self._began:,.0f} s so far")
        return self

    def change(self, text: str) -> None:
        """Go on to the next thing; the same ``text`` again changes nothing."""
        if text == self.text:
            return
        self.text, self._began = text, time.monotonic()
        if self._spinner is not None:
            self._spinner.reset(self._task, description=text)
        elif self._ticker is not None:
            print_line(f"{text}…")
            self._ticker.restart()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._spinner is not None:
            self._spinner.stop()
        if self._ticker is not None:
            self._ticker.stop()


class ProgressBar:
    """A bar over ``total`` units of work, used as a context manager.

    Args:
        title: what is being done.
        total: units of work in all; None where that is not known.
        unit: name of the unit, for the rate; ``bytes`` are shown as MB.
        start: units already done, when work resumes.
        above: lines that stand above the bar on a terminal, as they are when it is drawn.
    """

    def __init__(
        self, title: str, total: float | None, unit: str, start: float = 0, above: Callable[[], str] | None = None
    ) -> None:
        self._above = above
        self.title, self.total, self.done = title, total, start
        self.unit, self._scale = ("MB", 1e-6) if unit == "bytes" else (unit, 1.0)
        self._first = start
        self._note = ""
        self._bar: Any = None
        self._task: Any = None
        self._ticker: _Ticker | None = None
        self._began = 0.0
        self._file, self._written = os.environ.get(FILE_VARIABLE), float("-inf")

    def __enter__(self) -> ProgressBar:
        self._began = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.text import Text

            above = self._above

            class Shown(Progress):
                def get_renderables(self) -> Iterator[Any]:
                    if above is not None and (lines := above()):
                        yield Text(lines, no_wrap=True, overflow="ellipsis")
                    yield self.make_tasks_table(self.tasks)

            self._bar = Shown(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}", markup=False),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self.done, count=self._count(), rate="", note=""
            )
        else:
            print_line(f"{self.title}: {self._count()}")
            self._ticker = _Ticker(self._line)
        return self

    def update(self, done: float, note: str = "") -> None:
        """Set the units done so far, with a short ``note`` such as the latest loss."""
        self.done, self._note = done, note
        self._write_line()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, count=self._count(), rate=self._rate(), note=note)

    def _count(self) -> str:
        numbers = f"{self.done * self._scale:{self._format(self.total or self.done)}}"
        if self.total:
            numbers += f"/{self.total * self._scale:{self._format(self.total)}}"
        return f"{numbers} {self.unit}"

    def _format(self, of: float) -> str:
        return ",.1f" if self._scale != 1.0 and of * self._scale < 1000 else ",.0f"

    def _speed(self) -> float:
        return (self.done - self._first) / max(1e-9, time.monotonic() - self._began)

    def _rate(self) -> str:
        return f"{self._speed() * self._scale:,.1f} {self.unit}/s"

    def _line(self) -> str:
        speed = self._speed()
        parts = [self._count()]
        if speed > 0:
            parts.append(self._rate())
            if self.total and self.done < self.total:
                parts.append(f"{(self.total - self.done) / speed:,.0f} s left")
        return f"{self.title}: {', '.join(parts)}{'; ' if self._note else ''}{self._note}"

    def _write_line(self) -> None:
        finished = self.total is not None and self.done >= self.total
        if not self._file or (time.monotonic() - self._written < FILE_LINE_SECONDS and not finished):
            return
        self._written = time.monotonic()
        speed = self._speed()
        left = (self.total - self.done) / speed if self.total and speed > 0 else None
        line = {"title": self.title, "done": self.done, "total": self.total, "unit": self.unit, "seconds_left": left}
        with Path(self._file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._ticker is not None:
            self._ticker.stop()
            seconds = time.monotonic() - self._began
            if kind is None and seconds > SHORT_SECONDS:
                print_line(f"{self.title}: {self._count()} in {seconds:,.0f} s")


def print_line(line: str) -> None:
    """Print a line to stderr at once; beside a spinner or a bar, above it."""
    print(line, file=sys.stderr, flush=True)


class _Ticker:
    """Prints ``line()`` every ten seconds from a thread of its own, until it is stopped."""

    def __init__(self, line: Callable[[], str]) -> None:
        self._line = line
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="raylm-progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            if not self._wake.wait(PLAIN_LINE_SECONDS):
                print_line(self._line())
            elif self._stopped:
                return
            else:
                self._wake.clear()

    def restart(self) -> None:
        """Wait ten whole seconds again before the next line."""
        self._wake.set()

    def stop(self) -> None:
        """Print nothing more."""
        self._stopped = True
        self._wake.set()
        self._thread.join()
