"""What a followed job says, as its stage would show it here: on a terminal a bar, elsewhere the job's own lines."""

from __future__ import annotations

import re
import sys
from types import TracebackType

from raylm.progress import ProgressBar

# As raylm.progress writes it where there is no terminal, as in a job: "pretrain: 20/40 steps, 3.1 steps/s; loss 2.1".
_COUNT = re.compile(r"(?P<title>\S.*?): (?P<done>[\d,.]+)/(?P<total>[\d,.]+) (?P<unit>\w+)(?P<rest>$|,.*| in [\d,]+ s)")
_STILL = re.compile(r".*… [\d,]+ s so far")


class Shown:
    """Takes a job's output as it comes; used as a context manager."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._begun = self._note = ""
        self._bar: ProgressBar | None = None

    def __enter__(self) -> Shown:
        return self

    def write(self, text: str) -> None:
        """Show ``text``, which goes on where the last one ended, amid a line or not."""
        if not self._terminal:
            print(text, end="", flush=True)
            return
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        match = _COUNT.fullmatch(line)
        if match is None:
            # rich puts it above a bar. That something goes on is what a bar shows anyway.
            if self._bar is None or not _STILL.fullmatch(line):
                print(line, flush=True)
            return
        done, total = (float(match[name].replace(",", "")) for name in ("done", "total"))
        if self._bar is None or (self._bar.title, self._bar.total, self._bar.unit) != (
            match["title"],
            total,
            match["unit"],
        ):
            self._close()
            self._note = ""
            self._bar = ProgressBar(match["title"], total, match["unit"], done)
            self._bar.__enter__()
        # The last line says how long it took, and no figures.
        self._note = match["rest"].partition("; ")[2] or self._note
        self._bar.update(done, self._note)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
        if self._begun:
            print(self._begun, flush=True)
