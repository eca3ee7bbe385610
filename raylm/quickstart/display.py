"""What the quickstart shows while it runs: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from raylm.quickstart.running import Progress
from raylm.quickstart.stages import Stage, about, clock, seconds_left

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BAR_WIDTH = 10


class Display(Protocol):
    """Told of every stage; used as a context manager."""

    shows_output: bool
    """Whether the stages' own output is to be seen (then it goes to no log)."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def begin(self, stage: Stage, command: str) -> None:
        """``stage`` starts; ``command`` is what a user would type."""

    def poll(self, progress: Progress | None, last_line: str) -> None:
        """Called some times a second, with the running stage's progress bar and the last line that it printed."""

    def finish(self, result: str, *, worked: bool = True) -> None:
        """The running stage is through; ``worked``: it was not done already."""


def choose_display(stages: Sequence[Stage]) -> Display:
    """The table where stdout is a terminal that can redraw lines."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return TableDisplay(stages)
    return PlainDisplay(stages)


class PlainDisplay:
    """A line before and after each stage; the stages' own output is in between."""

    shows_output = True

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self._stage = self._stages[0]
        self._began = 0.0

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, stage: Stage, command: str) -> None:
        self._stage, self._began = stage, time.monotonic()
        number = self._stages.index(stage) + 1
        print(f"\n== {number}/{len(self._stages)} {stage.name}, {stage.purpose}: {command}", flush=True)

    def poll(self, progress: Progress | None, last_line: str) -> None:
        pass

    def finish(self, result: str, *, worked: bool = True) -> None:
        print(f"   {self._stage.name} took {time.monotonic() - self._began:.0f} s: {result}", flush=True)


class TableDisplay:
    """One table that is drawn again in place: stage, what it does, progress, time, result."""

    shows_output = False

    def __init__(self, stages: Sequence[Stage], console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._stages = list(stages)
        self._results: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._worked: dict[str, float] = {}
        self._running: Stage | None = None
        self._progress: Progress | None = None
        self._last_line = ""
        self._over = False
        self._began = time.monotonic()
        self._live = Live(console=console or Console(), auto_refresh=False, get_renderable=self.table)

    def __enter__(self) -> TableDisplay:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._last_line, self._over = "", True
        self._live.refresh()
        self._live.stop()
        self._live.console.print()

    def begin(self, stage: Stage, command: str) -> None:
        self._running, self._progress, self._last_line = stage, None, ""
        self._began = time.monotonic()
        self._live.refresh()

    def poll(self, progress: Progress | None, last_line: str) -> None:
        self._progress, self._last_line = progress, last_line
        self._live.refresh()

    def finish(self, result: str, *, worked: bool = True) -> None:
        stage, seconds = self._running, time.monotonic() - self._began
        assert stage is not None, "finish() follows begin()"
        self._results[stage.name], self._seconds[stage.name] = result, seconds
        if worked:
            self._worked[stage.name] = seconds
        self._running, self._progress, self._last_line = None, None, ""
        self._live.refresh()

    def left(self) -> float:
        """Seconds until all stages are through."""
        waiting = [stage for stage in self._stages if stage.name not in self._results]
        elapsed = time.monotonic() - self._began if self._running else 0.0
        own = self._progress.seconds_left if self._progress else None
        return seconds_left(waiting, self._worked, elapsed, own)

    def table(self) -> Table:
        """The table as it is now."""
        from rich.table import Table
        from rich.text import Text

        left = 0.0 if self._over else self.left()
        title = f"raylm quickstart: {about(left)} left" if left else "raylm quickstart"
        table = Table(title=title, box=None, title_justify="left", caption_justify="left", padding=(0, 2, 0, 0))
        table.caption = Text.from_ansi(self._last_line, no_wrap=True, overflow="ellipsis")
        for name, width in (("stage", 8), ("what it does", 19), ("progress", BAR_WIDTH), ("time", 10)):
            table.add_column(name, no_wrap=True, min_width=width, header_style="bold underline")
        table.add_column("result", overflow="fold", header_style="bold underline")
        for stage in self._stages:
            progress, seconds, result = self._cells(stage)
            style = "bold" if stage is self._running else "" if stage.name in self._results else "dim"
            table.add_row(stage.name, stage.purpose, progress, seconds, result, style=style)
        return table

    def _cells(self, stage: Stage):
        from rich.progress_bar import ProgressBar

        if stage.name in self._results:
            return "done", clock(self._seconds[stage.name]), self._results[stage.name]
        if stage is not self._running:
            return "", "", ""
        bar, elapsed = self._progress, time.monotonic() - self._began
        if self._over:
            return "stopped", clock(elapsed), ""
        if bar is None or not bar.total:
            return ProgressBar(pulse=True, width=BAR_WIDTH), clock(elapsed), ""
        seconds = clock(elapsed) if bar.seconds_left is None else f"{clock(bar.seconds_left)} left"
        return (
            ProgressBar(total=bar.total, completed=bar.done, width=BAR_WIDTH),
            seconds,
            f"{bar.done:,.0f} of {bar.total:,.0f} {bar.unit}",
        )
