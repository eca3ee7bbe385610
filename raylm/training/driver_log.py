"""What the driver of a run says, kept with the run: ``<run>/logs/driver-TIME-ATTEMPT.txt``.

In: all that is printed while the run is under way, and the error that ends it. Out: a file for each start. On a cluster
the driver's own log is a file of the head node, and goes with it.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from raylm.errors import RunFailure, UserError
from raylm.training.ray_train.places import LOGS

# Colours and movements of the cursor (ECMA-48, CSI sequences).
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class DriverLog:
    """Holds what was said until :meth:`begin` names the run, as a start that is refused leaves nothing of it."""

    def __init__(self) -> None:
        self._stream: IO[str] = io.StringIO()

    def begin(self, run: Path, attempt: str) -> None:
        """Write into the run's directory from here on."""
        said = self._stream.getvalue() if isinstance(self._stream, io.StringIO) else ""
        # A full or read-only disk is reported by what needs it.
        with contextlib.suppress(OSError):
            (run / LOGS).mkdir(exist_ok=True)
            self._stream = (run / LOGS / f"driver-{time.strftime('%Y%m%d-%H%M%S')}-{attempt}.txt").open(
                "a", encoding="utf-8"
            )
        with contextlib.suppress(OSError):
            self._stream.write(said)

    def line(self, text: str) -> None:
        """Add a line or several; bars that were drawn over each other leave their last state."""
        with contextlib.suppress(OSError, ValueError):
            for line in text.split("\n"):
                if shown := _CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip():
                    self._stream.write(f"{time.strftime('%H:%M:%S')} {shown}\n")
            self._stream.flush()


class _Copied:
    """A stream of the process, whose lines go to a log as well."""

    def __init__(self, stream: IO[str], log: DriverLog) -> None:
        self._stream, self._log, self._begun = stream, log, ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._log.line(line)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def driver_log() -> Iterator[DriverLog]:
    """Copy what this process prints within the block, and the error that ends it."""
    log = DriverLog()
    with contextlib.redirect_stdout(_Copied(sys.stdout, log)), contextlib.redirect_stderr(_Copied(sys.stderr, log)):  # type: ignore[type-var]
        try:
            yield log
        except (RunFailure, UserError) as error:
            log.line(f"{type(error).__name__}: {error}")
            raise
        except BaseException as error:
            log.line("".join(traceback.format_exception(error)))
            raise
