"""A followed job's output, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from raylm.launcher.shown import Shown

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = [
    "pretrain: starting 2 workers…\npretrain: 0/40 st",
    "eps\npretrain: 20/40 steps, 3.1 steps/s, 6 s left; loss 2.1000\n",
    "a line of its own\npretrain: 40/40 steps in 12 s\n", "pretrain: 40 steps, 10,240 tokens\n",
]  # fmt: skip
PROGRAM = f"""
from raylm.launcher.shown import Shown
with Shown() as shown:
    for part in {OUTPUT!r}:
        shown.write(part)
"""


def test_without_a_terminal_it_is_the_jobs_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Shown() as shown:
        for part in OUTPUT:
            shown.write(part)
    assert capsys.readouterr().out == "".join(OUTPUT)


def test_on_a_terminal_counts_are_a_bar() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "100"}, cwd=ROOT
    )
    os.close(slave)
    screen = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        screen += part
    os.close(master)
    assert process.wait(60) == 0
    text = screen.decode()
    assert "━" in text
    assert "40/40 steps" in text
    assert "loss 2.1000" in text
    # Other lines stand as they are; none of the counts is a line of its own.
    assert "a line of its own\r\n" in text
    assert "pretrain: 40 steps, 10,240 tokens\r\n" in text
    assert "pretrain: 20/40 steps, 3.1" not in text
