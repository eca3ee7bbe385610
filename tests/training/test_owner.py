"""Two starts of one run that overlap, as on hosts that do not see each other's locks: the later wins, nothing is lost.

Real processes, each with a loop of its own on one folder; the loop itself takes no lock.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raylm.training.checkpoints.mirror import OWNER
from raylm.training.checkpoints.storage import Storage
from raylm.training.checkpoints.store import damaged_files, newest_whole
from raylm.training.reports.metrics import read_metrics
from tests.training.loops import ROOT, run_case, run_loops

PATIENCE_SECONDS = 120.0
STEPS = 400


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Wait for something that ``process`` does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begin a start of a run: its name and its case."""
    processes = []

    def begin(name: str, case: dict) -> subprocess.Popen[str]:
        (tmp_path / f"{name}.json").write_text(json.dumps([case]))
        arguments = [str(tmp_path / f"{name}-results.json"), str(tmp_path / f"{name}.json")]
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests/training/loop_process.py"), *arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def owner(run: Path) -> str:
    return json.loads((run / OWNER).read_text())["attempt"] if (run / OWNER).is_file() else ""


@pytest.mark.slow
@pytest.mark.parametrize("held_up_until", ["taken over", "far ahead"])
def test_the_later_of_two_starts_wins(make_run: Callable, start: Callable, tmp_path: Path, held_up_until: str) -> None:
    undisturbed = make_run("undisturbed", training={"steps": STEPS})
    run_loops(run_case(undisturbed.config))
    run = make_run("twice", training={"steps": STEPS})
    folder = run.metrics.parent
    first = start("first", run_case(run.config))
    run.wait_for_step(45, first)
    # As a host is that is out of memory, or whose machine is moved.
    os.killpg(first.pid, signal.SIGSTOP)
    before = owner(folder)
    second = start("second", run_case(run.config))
    wait_until(lambda: owner(folder) not in ("", before), second, "the second start did not take over")
    if held_up_until == "far ahead":
        # The second has cut the metrics to the checkpoint that it goes on from.
        wait_until(lambda: read_metrics(run.metrics)[-1]["step"] > 100, second, "the second start did not go on")
    os.killpg(first.pid, signal.SIGCONT)
    _, errors = first.communicate(timeout=PATIENCE_SECONDS)
    assert first.returncode != 0
    assert "was taken over by a later start of the same run (on " in errors, errors[-3000:]
    _, errors = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 0, errors[-3000:]

    assert run.losses() == undisturbed.losses()
    checkpoints = Storage(folder / "checkpoints")
    found, damaged = newest_whole(checkpoints)
    assert str(found).endswith(f"step-{STEPS:08d}") and not damaged
    # Every one that counts is whole, and only as many are kept as are wanted.
    assert [damaged_files(checkpoints / name) for name in checkpoints.names() if name.startswith("step-")] == [[], []]
    weights = [one.parent / "model" / "model.safetensors" for one in (run.metrics, undisturbed.metrics)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
