"""The quickstart itself: what is refused before it starts, a stage that fails, Ctrl-C, and the whole of it, tiny."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylm.errors import RunFailure, UserError
from raylm.quickstart.pipeline import run_quickstart

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "prepare": ["data.validation_fraction=0.005"],
    "pretrain": ["training.steps=6", "training.warmup_steps=2", "training.evaluate_every_steps=6",
                 "resources.workers=1"],
    "finetune": ["training.epochs=null", "training.steps=4", "training.warmup_steps=2",
                 "training.evaluate_every_steps=4", "training.evaluation_batches=1", "resources.workers=1"],
    "tune": ["training.steps=2", "training.warmup_steps=1", "training.evaluate_every_steps=2",
             "training.evaluation_batches=1", "tuning.trials=1"],
    "evaluate": ["resources.workers=1"],
    "compress": ["compression.prompts=2", "compression.new_tokens=8"],
}  # fmt: skip


def in_terminal(arguments: dict, directory: Path, *, ctrl_c_after: str = "", seconds: float = 300) -> tuple[int, str]:
    """Run the quickstart with ``arguments`` in a pseudo-terminal; its status and all that it wrote there.

    Args:
        ctrl_c_after: text on the screen upon which Ctrl-C is typed.
    """
    code = (
        "import sys, raylm.quickstart.pipeline as pipeline\nfrom raylm.cli import run_and_exit\n"
        "whole = pipeline.run_quickstart\n"
        f"pipeline.run_quickstart = lambda directory, **options: whole(directory, **options, overrides={arguments!r})\n"
        "run_and_exit(['quickstart'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=directory, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                try:
                    piece = os.read(ours, 65536)
                except OSError as error:
                    assert error.errno == errno.EIO  # the other end is closed
                    break
                if not piece:
                    break
                shown += piece
            if ctrl_c_after and ctrl_c_after in shown.decode(errors="replace"):
                os.write(ours, b"\x03")
                ctrl_c_after = ""
        return process.wait(max(1.0, deadline - time.monotonic())), shown.decode(errors="replace")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the results should go")
    with pytest.raises(UserError, match=r"runs/quickstart cannot be written: .*; start in another directory"):
        run_quickstart(tmp_path)


def test_a_stage_that_fails_ends_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailure, match="prepare ended with status 2; see above"):
        run_quickstart(tmp_path, overrides={"prepare": ["data.train=/no/such/file"]})
    shown = capfd.readouterr()
    assert "== 1/7 prepare" in shown.out
    assert "/no/such/file" in shown.err


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(RunFailure):
            run_quickstart(tmp_path, overrides={"prepare": ["data.train=/no"], "serve": [f"serving.port={port}"]})
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith(f"quickstart: port {port} is in use by ")
    assert "; the server takes port " in first


def test_on_a_terminal_a_failure_shows_the_table_the_last_lines_and_the_log(tmp_path: Path) -> None:
    status, shown = in_terminal({"prepare": ["data.train=/no/such/file"]}, tmp_path, seconds=60)
    assert status == 1
    for text in (
        "what it does",
        "stopped",
        "prepare ended with status 2",
        "runs/quickstart/logs/prepare.log",
        "such/file",
    ):
        assert text in shown.replace("\r\n", "").replace("\n", ""), text
    assert "/no/such/file" in (tmp_path / "runs" / "quickstart" / "logs" / "prepare.log").read_text()


def test_ctrl_c_stops_the_stage_and_says_how_to_go_on(tmp_path: Path) -> None:
    began = time.monotonic()
    status, shown = in_terminal({}, tmp_path, ctrl_c_after="prepare", seconds=90)
    assert status == 130
    assert "quickstart: stopped; the same command goes on from here" in shown
    assert "raylm: interrupted" in shown
    assert "Traceback" not in shown
    assert time.monotonic() - began < 80
    assert not (tmp_path / "runs" / "quickstart" / "data" / "report.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_quickstart_on_a_terminal(tmp_path: Path) -> None:
    port = free_port()
    status, shown = in_terminal({**TINY, "serve": [f"serving.port={port}"]}, tmp_path, seconds=1100)
    assert status == 0, shown[-3000:]
    url = f"http://127.0.0.1:{port}/"
    for text in ("bits per byte", "question: ", "sources: ", "streamed: ", "Done in", url, "3. Your programs"):
        assert text in shown, text
    assert "Traceback" not in shown
    logs = sorted(path.stem for path in (tmp_path / "runs" / "quickstart" / "logs").glob("*.log"))
    assert logs == ["compress", "evaluate", "finetune", "prepare", "pretrain", "serve", "tune"]
    assert json.loads((tmp_path / "runs" / "quickstart" / "answers.json").read_text())["questions"] > 0
