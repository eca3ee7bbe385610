"""What a stage says about itself: at once, before anything heavy is imported, and as long as it lasts."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raylm import progress
from raylm.progress import Activity, ProgressBar

HEAVY = re.compile(r"^import time: .*\|\s+(torch|ray|transformers)$")


def test_the_first_line_comes_before_heavy_imports(tmp_path: Path) -> None:
    values = {
        "run": {"name": "run", "storage": str(tmp_path)},
        "data": {"train": str(tmp_path / "nowhere.txt")},
        "model": {"family": "llama", "config": {"hidden_size": 32}},
        "training": {"steps": 2},
    }
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(values))
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "raylm.cli", "pretrain", str(tmp_path / "pretrain.yaml")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = []
    try:
        for line in process.stderr:
            if HEAVY.match(line):
                break
            if not line.startswith("import time:"):
                seen.append(line)
        else:
            pytest.fail("nothing heavy was imported: the stage ended early")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert seen[0] == "pretrain: importing libraries…\n"


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from raylm.cli import main\n"
        "try: main(['report', '--help'])\n"
        "finally: assert not {'torch', 'ray', 'transformers'} & set(sys.modules), sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "in the current one" in " ".join(result.stdout.split())


def test_plain_lines_go_on_until_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.1)
    with Activity("starting Ray") as activity:
        time.sleep(0.35)
        activity.change("joining")
        activity.change("joining")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "starting Ray…" and lines[-1] == "joining…"
    assert len(lines) >= 4 and all(re.fullmatch(r"starting Ray… \d+ s so far", line) for line in lines[1:-1])
    time.sleep(0.3)
    assert not capsys.readouterr().err


def test_a_bar_that_is_not_updated_still_says_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.1)
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0.1)
    with ProgressBar("reading", 4_000_000, "bytes") as bar:
        bar.update(1_000_000, "first file")
        time.sleep(0.35)
        bar.update(4_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 0.0/4.0 MB"
    assert re.fullmatch(r"reading: 1\.0/4\.0 MB, [\d.,]+ MB/s, \d+ s left; first file", lines[1])
    assert re.fullmatch(r"reading: 4\.0/4\.0 MB in \d+ s", lines[-1])


def test_a_terminal_gets_a_spinner_that_leaves_nothing_behind() -> None:
    leader, follower = pty.openpty()
    code = "from raylm.progress import Activity\nimport time\nwith Activity('loading [red]x'): time.sleep(0.5)"
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # what a terminal whose other side is gone gives
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait(30) == 0
    assert b"loading [red]x" in shown
    assert shown.rstrip().endswith(b"\x1b[2K"), "the line is cleared"
