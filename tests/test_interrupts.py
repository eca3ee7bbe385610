"""Ctrl-C and SIGTERM, in processes of their own: one line, the status that a shell gives, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.processes import start

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 120.0


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    """Read standard error up to a line with ``text``; the lines."""
    lines = []
    while text not in (lines[-1:] or [""])[0]:
        line = process.stderr.readline()
        assert line, lines
        lines.append(line.rstrip("\n"))
    return lines


PROGRAM = """
import sys, time
from raylm.cli import _interrupted
from raylm.interrupts import deferred, ended_at_once, insistent, interruptible

def work():
    {work}

def say(text):
    print(text, file=sys.stderr, flush=True)

with interruptible() as interrupts:
    try:
        work()
        say("done")
        status = 0
    except KeyboardInterrupt:
        status = _interrupted(interrupts)
sys.exit(status)
"""
DEFERRED = """
    with deferred() as signals:
        say("begun")
        while signals.received is None:
            time.sleep(0.01)
        say(f"saving after {signals.received.name}")
        time.sleep(SECONDS)
        say("saved")
"""


def program(work: str) -> subprocess.Popen[str]:
    return start("-c", PROGRAM.replace("    {work}", work))


@pytest.mark.parametrize(("number", "line"), [
    (signal.SIGINT, "raylm: interrupted"),
    (signal.SIGTERM, "raylm: ended by SIGTERM"),
    (signal.SIGHUP, "raylm: ended by SIGHUP"),
])  # fmt: skip
def test_the_first_signal_is_a_notice(number: signal.Signals, line: str) -> None:
    process = program(DEFERRED.replace("SECONDS", "0.2"))
    wait_for(process, "begun")
    process.send_signal(number)
    # What timeout(1) does: the command, then its group.
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert errors.splitlines() == [f"saving after {number.name}", "saved", line]
    assert process.returncode == 128 + number


def test_the_second_signal_ends_at_once() -> None:
    process = program(DEFERRED.replace("SECONDS", "60"))
    wait_for(process, "begun")
    process.send_signal(signal.SIGINT)
    wait_for(process, "saving")
    time.sleep(0.7)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert errors.splitlines() == ["raylm: interrupted"]
    assert process.returncode == 130
    assert time.monotonic() - began < 10


def test_a_failure_while_ending_is_told() -> None:
    process = program(DEFERRED.replace("time.sleep(SECONDS)", "raise OSError('disk full')"))
    wait_for(process, "begun")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert errors.splitlines()[-1] == "OSError: disk full"
    assert process.returncode == 1


SWALLOWING = """
    with insistent():
        for _ in range(3):
            try:
                say("begun")
                time.sleep(30)
            except:
                say("swallowed")
        time.sleep(30)
"""


def test_an_interrupt_that_a_library_swallows_is_repeated() -> None:
    """A bare ``except`` around an import, as libraries have it, three times over."""
    process = program(SWALLOWING)
    wait_for(process, "begun")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert errors.splitlines() == [*["swallowed", "begun"] * 2, "swallowed", "raylm: ended by SIGTERM"]
    assert process.returncode == 143


FINALIZER = """
    class Slow:
        def __del__(self):
            say("begun")
            time.sleep(30)
    Slow()
    time.sleep(30)
"""


def test_an_interrupt_in_a_finalizer_is_repeated_and_shows_no_traceback() -> None:
    process = program(FINALIZER)
    wait_for(process, "begun")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors.splitlines()) == (143, ["raylm: ended by SIGTERM"])


LIKE_RAY = """
    import signal
    from raylm.cluster.session import _own_termination
    with _own_termination():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
""" + FINALIZER.replace("\n    ", "\n        ")


def test_an_exit_of_ray_while_it_starts_is_the_end_too() -> None:
    process = program(LIKE_RAY)
    wait_for(process, "begun")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors.splitlines()) == (143, ["raylm: ended by SIGTERM"])


def test_an_import_is_ended_at_once() -> None:
    process = program(SWALLOWING.replace("insistent()", "ended_at_once()"))
    wait_for(process, "begun")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors.splitlines()) == (130, ["raylm: interrupted"])


def test_what_is_ignored_stays_ignored() -> None:
    """As under nohup, and in the background of a script."""
    for ignored in (signal.SIGHUP, signal.SIGINT):
        before = signal.signal(ignored, signal.SIG_IGN)
        try:
            work = f"    import os; os.kill(os.getpid(), {int(ignored)})"
            process = subprocess.run(
                [sys.executable, "-c", PROGRAM.replace("    {work}", work)],
                env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
            )  # fmt: skip
        finally:
            signal.signal(ignored, before)
        assert (process.returncode, process.stderr) == (0, "done\n")


def write_config(directory: Path, model: Path, stage: str) -> Path:
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    values = {
        "run": {"name": "one", "storage": str(directory / "runs")},
        "data": {"train": str(directory / "text.txt")},
        "model": {"path": str(model)},
        "evaluation": {"sequence_length": 64},
    }
    if stage == "compress":
        values["compression"] = {"prompts": 8, "prompt_tokens": 8, "new_tokens": 8}
    path = directory / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("stage", "at"), [
    ("compress", "importing libraries"), ("compress", "step 1, 8-bit weights"), ("evaluate", "reading the model"),
])  # fmt: skip
def test_a_stage_ends_in_one_line(
    tiny_model: Path, tmp_path: Path, stage: str, at: str, number: signal.Signals
) -> None:
    process = start("-m", "raylm.cli", stage, str(write_config(tmp_path, tiny_model, stage)))
    wait_for(process, at)
    time.sleep(0.5)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    line = "raylm: interrupted" if number == signal.SIGINT else "raylm: ended by SIGTERM"
    assert errors.splitlines()[-1] == line
    assert process.returncode == 128 + number
    assert "Traceback" not in errors and not output
    assert not (tmp_path / "runs" / "one" / "report.json").exists()
    assert not (tmp_path / "runs" / "one" / "model").exists()
