"""Runs that are disturbed: killed, frozen and ended processes, a full disk, bad batches. Real processes throughout."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raylm.config import load_config
from raylm.config.training import AnomaliesSection
from raylm.training.loop.anomalies import batch_of_step, find_anomaly, leave_out
from raylm.training.reports.events import read_events
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import pretrain
from tests.cpus import become_free, holders_of_cpus
from tests.processes import start

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_random_kills_of_workers_and_the_driver_change_no_bit(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/benchmarks/kill_test.py"), "1", "1", "40"],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["losses_identical"]
    assert found["weights_identical"]


@pytest.mark.slow
def test_collective_time_out_and_ended_worker(make_run: Callable) -> None:
    limits = {"heartbeat_seconds": None, "collective_timeout_seconds": 8.0}
    run = make_run("stuck", training={"steps": 400}, resources={"workers": 2, **limits})
    driver = run.start()
    run.wait_for_step(30, driver)
    run.workers(driver)[-1].send_signal(signal.SIGSTOP)
    run.wait_for_restart(driver)
    logs = list(run.metrics.parent.glob("failures/*/rank-*.txt"))
    text = "".join(log.read_text() for log in logs)
    assert "no step for 4 s; stacks of all threads" in text
    # Where it waits for the other one: in the step itself, or for what the ranks tell each other after it.
    assert re.search(r"line \d+ in (train_step|mean_loss|exchange)\n", text)
    assert "Traceback" in text

    run.wait_for_step(60, driver)
    run.workers(driver)[0].send_signal(signal.SIGTERM)
    run.wait_for_restart(driver)
    # What SIGTERM interrupted was saved: the workers go on from there, not from the last regular checkpoint.
    saved = [line["step"] for line in read_metrics(run.metrics)][-1]
    _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors[-2000:]
    assert "told to end (SIGTERM)" in errors
    assert saved >= 60
    assert len(run.losses()) == 400
    report = json.loads((run.metrics.parent / "report.json").read_text())
    assert len(report["restarts"]) == 2
    events = read_events(run.metrics.parent)
    assert [event["kind"] for event in events].count("restart") == 2
    assert {event["kind"] for event in events} == {"restart", "resume"}


@pytest.mark.slow
def test_interrupt_leaves_nothing_of_ray_train(ray_instance, make_run: Callable) -> None:
    run = make_run("interrupted", training={"steps": 100000})

    def interrupt() -> None:
        run.wait_for_step(5)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        pretrain(load_config("pretrain", run.config))
    # A thread that waits in Ray while Ray shuts down ends the process.
    assert "raylm-fit" not in [thread.name for thread in threading.enumerate()]
    assert become_free(), f"the workers' CPUs are not free again: {holders_of_cpus()}"


@pytest.mark.slow
def test_interrupted_command_saves_and_says_so(make_run: Callable) -> None:
    """Where a checkpoint is due once an hour, Ctrl-C saves one; a second Ctrl-C ends without."""
    hourly = {"every_steps": None, "every_seconds": 3600.0}
    run = make_run("interrupted", training={"steps": 100000}, checkpoint=hourly)
    driver = start("-m", "raylm.cli", "pretrain", str(run.config))
    run.drivers.append(driver)
    run.wait_for_step(5, driver)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130
    *_, notice, saved, last = errors.splitlines()
    assert notice.startswith("pretrain: ") and "Traceback" not in errors
    step = int(re.fullmatch(r"pretrain: stopped after step (\d+), which was saved; the same command goes on", saved)[1])
    assert last == "raylm: interrupted"
    assert step >= 5
    assert (run.metrics.parent / "checkpoints" / f"step-{step:08d}" / "checkpoint.json").is_file()
    assert [event["kind"] for event in read_events(run.metrics.parent)] == ["interrupted"]
    # The same command goes on from there, and SIGTERM does the same.
    driver = run.start()
    run.wait_for_step(step + 5, driver)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 143
    assert errors.splitlines()[-1] == "raylm: ended by SIGTERM"
    assert "which was saved" in errors
    events = read_events(run.metrics.parent)
    assert [event["kind"] for event in events] == ["interrupted", "resume", "interrupted"]
    assert events[1]["step"] == step


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(directory)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"only root may mount a file system: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.slow
def test_full_disk_loses_nothing_and_a_read_only_one_is_refused(make_run: Callable, small_disk: Path) -> None:
    run = make_run("full", small_disk, training={"steps": 120})
    driver = run.start()
    run.wait_for_step(45, driver)
    # Without a buffer, whose rest would be refused once more when the file is closed.
    with (small_disk / "filler").open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(bytes(1 << 16))
    _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 1, errors[-2000:]
    assert "No space left on device" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    (small_disk / "filler").unlink()

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    driver = run.start()
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 2, errors[-2000:]
    assert errors.strip().splitlines()[-1].startswith("raylm: error: run.storage:")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)

    before = read_metrics(run.metrics)
    driver = run.start()
    _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors[-2000:]
    assert len(run.losses()) == 120
    # It went on from a checkpoint: the lines up to it are the first start's own.
    assert read_metrics(run.metrics)[:40] == before[:40]


def test_left_out_batches_shift_the_following_ones() -> None:
    skipped = leave_out(leave_out([], 6, 8), 3, 4)
    assert skipped == [[3, 4], [6, 8]]
    assert [batch_of_step(step, skipped) for step in range(7)] == [0, 1, 2, 4, 5, 8, 9]
    assert leave_out(skipped, 4, 6) == [[3, 8]]


def test_spike_is_judged_against_the_median_of_a_full_window() -> None:
    section, state = AnomaliesSection(spike_factor=2.0, window=3), {}
    assert [find_anomaly(section, state, 1.0, loss) for loss in (9.0, 1.0, 1.2)] == [None] * 3
    assert "times the median of the last 3 steps" in find_anomaly(section, state, 1.0, 2.5)
    assert find_anomaly(section, state, 1.0, 2.3) is None
    assert find_anomaly(section, state, float("nan"), 1.0) == "the gradient is not finite"
    # DeepSpeed's word for it.
    assert find_anomaly(section, state, -1.0, 1.0) == "the gradient is not finite"
