"""Runs the quickstart's commands as processes of their own: logs, progress, a clean end, and their peak of memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raylm.progress import FILE_VARIABLE

POLL_SECONDS = 0.25
# What is interrupted stops its workers and Ray; then it is asked again, and ended at last.
INTERRUPT_SECONDS, TERMINATE_SECONDS = 60.0, 10.0
_TAIL_BYTES = 16_384


@dataclass(frozen=True)
class Progress:
    """What a command's latest progress bar shows; ``seconds_left`` is None where it cannot tell."""

    title: str
    done: float
    total: float | None
    unit: str
    seconds_left: float | None


class Command:
    """One command in a process and session of its own.

    A terminal's Ctrl-C reaches this process alone, which passes it on once: a command that gets it twice would be
    interrupted while it stops its workers.

    Args:
        command: program and arguments.
        directory: its working directory.
        log: file that its output is appended to; None leaves the output to this process's own.
    """

    def __init__(self, command: list[str], directory: Path, log: Path | None) -> None:
        self.log = log
        self._log_start = 0
        self._progress_file = None if log is None else log.with_suffix(".progress")
        environment = dict(os.environ)
        with contextlib.ExitStack() as stack:
            output = None
            if log is not None:
                output = stack.enter_context(log.open("ab"))
                self._log_start = log.stat().st_size
                self._progress_file.unlink(missing_ok=True)
                environment[FILE_VARIABLE] = str(self._progress_file.resolve())
            self.process = subprocess.Popen(
                command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT if output else None, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._progress_file is not None:
            self._progress_file.unlink(missing_ok=True)

    def wait(self, on_poll: Callable[[], None], until: Callable[[], bool] = lambda: False) -> int | None:
        """Wait for the end, or for ``until``, calling ``on_poll`` in between; exit status, None while it runs."""
        while not until():
            on_poll()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(POLL_SECONDS)
        return self.process.poll()

    def stop(self) -> None:
        """Interrupt the command if it still runs, and wait for it; a second Ctrl-C ends it at once."""
        for number, seconds in ((signal.SIGINT, INTERRUPT_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS)):
            if self.process.poll() is not None:
                return
            self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                self.process.wait(seconds)
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def progress(self) -> Progress | None:
        """The latest of its progress bars; None before there is one, or without a log."""
        if self._progress_file is None:
            return None
        for line in reversed(_tail(self._progress_file, 0)):
            with contextlib.suppress(json.JSONDecodeError, TypeError):  # half-written
                return Progress(**json.loads(line))
        return None

    def last_lines(self, count: int) -> list[str]:
        """The last ``count`` lines of its output that are not empty; nothing without a log."""
        return [] if self.log is None else [line for line in _tail(self.log, self._log_start) if line.strip()][-count:]


def _tail(path: Path, start: int) -> list[str]:
    """Lines at the end of a file, of what comes after byte ``start``."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, size - _TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


class MemoryWatch:
    """Peak memory of this process and everything it started, bytes: private pages plus the largest shared part."""

    def __init__(self, interval: float = 1.0) -> None:
        self.peak = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        root = psutil.Process()
        while not self._stop.wait(self._interval):
            private, shared = 0, 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    info = process.memory_info()
                except psutil.Error:
                    continue
                common = getattr(info, "shared", 0)  # Linux alone tells it
                private += info.rss - common
                shared = max(shared, common)
            self.peak = max(self.peak, private + shared)
