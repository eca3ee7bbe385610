"""Search spaces, what fits at a time, and a real search."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from raylm.config import load_config
from raylm.config.tuning import Distribution
from raylm.errors import UserError
from raylm.tuning.search import concurrency, draw_candidates
from raylm.tuning.stage import tune
from tests.conftest import holders_of_cpus


def write_config(directory: Path, model: Path, **tuning) -> Path:
    rows = [{"prompt": f"fox {i}?", "answer": "jumps over the dog"} for i in range(40)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"name": "search", "storage": str(directory)},
        "data": {"train": str(directory / "pairs.jsonl"), "validation_fraction": 0.2},
        "model": {"path": str(model)},
        "training": {"steps": 12, "batch_size": 4, "sequence_length": 32, "evaluate_every_steps": 4},
        "tuning": {"space": {"training.learning_rate": {"grid": [1e-6, 1e-2]}}, **tuning},
        "resources": {"workers": 1},
    }
    path = directory / "tune.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_draws_are_a_function_of_the_seed_and_stay_inside() -> None:
    space = {
        "training.learning_rate": Distribution(log_uniform=[1e-5, 1e-2]),
        "training.weight_decay": Distribution(grid=[0.0, 0.1]),
        "training.batch_size": Distribution(integer=[1, 4]),
    }
    drawn = draw_candidates(space, 5, seed=3)
    assert drawn == draw_candidates(space, 5, seed=3) != draw_candidates(space, 5, seed=4)
    assert len(drawn) == 10
    assert [c["training.weight_decay"] for c in drawn] == [0.0, 0.1] * 5
    assert all(1e-5 <= c["training.learning_rate"] <= 1e-2 and 1 <= c["training.batch_size"] <= 4 for c in drawn)


def test_concurrency_comes_from_the_resources(tiny_model: Path, tmp_path: Path) -> None:
    config = load_config("tune", write_config(tmp_path, tiny_model))
    assert concurrency(config, cpus=4, gpus=0, use_gpu=False, workers=1) == 4
    assert concurrency(config, cpus=5, gpus=0, use_gpu=False, workers=2) == 2
    assert concurrency(config, cpus=8, gpus=3, use_gpu=True, workers=2) == 1
    with pytest.raises(UserError, match=r"resources\.workers: found 8"):
        concurrency(config, cpus=4, gpus=0, use_gpu=False, workers=8)
    greedy = load_config("tune", tmp_path / "tune.yaml", ["tuning.max_concurrent=9"])
    with pytest.raises(UserError, match=r"tuning\.max_concurrent: found 9, allowed: at most 4"):
        concurrency(greedy, cpus=4, gpus=0, use_gpu=False, workers=1)


@pytest.mark.slow
def test_search_exports_the_best_trial(
    ray_instance, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(load_config("tune", write_config(tmp_path, tiny_model, scheduler="none")))
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [row["status"] for row in report["trials"]] == ["finished", "finished"]
    assert report["best"]["training.learning_rate"] == 1e-2
    losses = {row["training.learning_rate"]: row["validation_loss"] for row in report["trials"]}
    assert losses[1e-2] < losses[1e-6] - 0.1
    best = (tmp_path / "search" / "trials" / "trial-001" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "search" / "model" / "model.safetensors").read_bytes() == best
    assert re.search(r"^ *best +trial 1,", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_trials_of_several_workers_are_stopped_early(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    """Two trials, nested Ray Train runs of two workers each: the second, which is behind the first, is cut short."""
    path = write_config(tmp_path, tiny_model, max_concurrent=1)
    overrides = ["resources.workers=2", "training.steps=60", "training.learning_rate=1.0e-4"]
    tune(load_config("tune", path, [*overrides, "tuning.space={training.learning_rate: {grid: [1.0e-2, 1.0e-7]}}"]))
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [row["status"] for row in report["trials"]] == ["finished", "stopped"]
    assert report["trials"][0]["step"] == 60 > report["trials"][1]["step"] > 0
    assert report["best"]["training.learning_rate"] == 1e-2
    assert (tmp_path / "search" / "model" / "model.safetensors").is_file()
    # What the stopped trial's workers held is free again.
    deadline = time.monotonic() + 20
    while ray_instance.available_resources()["CPU"] < ray_instance.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, holders_of_cpus()
        time.sleep(0.2)


@pytest.mark.slow
def test_interrupted_search_keeps_finished_trials(tiny_model: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_model, scheduler="none", max_concurrent=1)
    command = [sys.executable, "-m", "raylm.cli", "tune", str(path), "training.steps=100"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    trials = tmp_path / "search" / "trials"
    try:
        wait_until(lambda: (trials / "trial-001" / "metrics.jsonl").exists(), first)
    finally:
        first.kill()
    first.communicate(timeout=60)
    assert not (tmp_path / "search" / "report.json").exists()
    finished = (trials / "trial-000" / "model" / "model.safetensors").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert again.returncode == 0, again.stderr[-2000:]
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [row["status"] for row in report["trials"]] == ["finished", "finished"]
    assert [row["step"] for row in report["trials"]] == [100, 100]
    # The trial that was done was not started again.
    assert (trials / "trial-000" / "model" / "model.safetensors").stat().st_mtime_ns == finished


def wait_until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait at most four minutes for ``reached`` while ``process`` runs."""
    until = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tuning.space={training.learnin_rate: {grid: [1.0]}}", "training.learnin_rate: unknown key"),
        ("tuning.space={run.name: {grid: [a]}}", "found 'run.name', allowed: keys of training and objective"),
        ("tuning.space={training.learning_rate: {uniform: [2.0, 1.0]}}", "allowed: [low, high] with low < high"),
        ("tuning.space={training.learning_rate: {grid: [-1.0]}}", "training.learning_rate: found -1.0"),
    ],
)
def test_refused(tiny_model: Path, tmp_path: Path, override: str, expected: str) -> None:
    path = write_config(tmp_path, tiny_model)
    with pytest.raises(UserError) as caught:
        tune(load_config("tune", path, [override]))
    assert expected in str(caught.value)
    assert not (tmp_path / "search").exists()
