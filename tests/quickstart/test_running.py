"""Commands of the quickstart: logs, progress, and how they end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from raylm.progress import FILE_VARIABLE, ProgressBar
from raylm.quickstart.running import Command, MemoryWatch, Progress


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_goes_to_the_log_and_only_this_run_is_read(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    log.write_text("of an earlier run\n")
    polls: list[None] = []
    with Command(
        python("import sys; print('first'); print('last', file=sys.stderr); sys.exit(3)"), tmp_path, log
    ) as it:
        assert it.wait(lambda: polls.append(None)) == 3
    assert sorted(it.last_lines(5)) == ["first", "last"]
    assert log.read_text().startswith("of an earlier run\n")
    assert polls


def test_progress_of_a_bar_in_another_process(tmp_path: Path) -> None:
    code = (
        "import time\nfrom raylm.progress import ProgressBar\n"
        "with ProgressBar('pretrain', 40, 'steps', 10) as bar:\n"
        "    time.sleep(0.1); bar.update(20, 'loss 3'); time.sleep(60)"
    )
    with Command(python(code), tmp_path, tmp_path / "stage.log") as command:
        deadline = time.monotonic() + 30
        assert command.wait(lambda: None, lambda: bool(command.progress()) or time.monotonic() > deadline) is None
        progress = command.progress()
    assert progress is not None
    assert (progress.title, progress.done, progress.total, progress.unit) == ("pretrain", 20, 40, "steps")
    assert progress.seconds_left == pytest.approx(2 * 0.1, rel=0.9)  # 10 steps in 0.1 s or a little more, 20 left
    assert command.process.returncode is not None
    assert list(tmp_path.glob("*.progress")) == []


def test_a_bar_writes_its_end_and_not_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "lines"))
    with ProgressBar("work", 1000, "units") as bar:
        for done in range(1, 1001):
            bar.update(done)
    lines = (tmp_path / "lines").read_text().splitlines()
    assert 2 <= len(lines) <= 5
    assert '"done": 1000' in lines[-1]
    assert Progress("work", 1000, 1000, "units", 0.0).seconds_left == 0


def test_an_interrupt_reaches_the_command_once(tmp_path: Path) -> None:
    code = (
        "import time\nprint('up', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True); time.sleep(0.5); print('clean', flush=True)"
    )
    with Command(python(code), tmp_path, tmp_path / "stage.log") as command:
        deadline = time.monotonic() + 30
        command.wait(lambda: None, lambda: bool(command.last_lines(1)) or time.monotonic() > deadline)
    assert command.last_lines(3) == ["up", "interrupted", "clean"]
    assert command.process.returncode == 0


def test_what_does_not_listen_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylm.quickstart.running.INTERRUPT_SECONDS", 0.5)
    monkeypatch.setattr("raylm.quickstart.running.TERMINATE_SECONDS", 0.5)
    code = (
        "import signal, time\nfor number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    with Command(python(code), tmp_path, tmp_path / "stage.log") as command:
        deadline = time.monotonic() + 30
        command.wait(lambda: None, lambda: bool(command.last_lines(1)) or time.monotonic() > deadline)
    assert command.process.returncode == -9


def test_memory_of_children_counts(tmp_path: Path) -> None:
    with (
        MemoryWatch(0.05) as memory,
        Command(
            python("data = bytearray(b'x') * 200_000_000; import time; time.sleep(1.5)"), tmp_path, None
        ) as command,
    ):
        assert command.wait(lambda: None) == 0
    assert memory.peak > 200_000_000
    assert os.getpid() != command.process.pid
