"""Search spaces, what fits at a time, and a real search."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from raylm.config import load_config
from raylm.config.tuning import Distribution, TuningSection
from raylm.errors import UserError
from raylm.tuning.ray_tune import whole_record
from raylm.tuning.search import Outcome, concurrency, trial_config
from raylm.tuning.space import draw_candidates
from raylm.tuning.stage import tune
from tests.cpus import become_free, holders_of_cpus
from tests.processes import start


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
        "training.batch_size": Distribution(integer=[1, 2]),
        "training.optimizer": Distribution(choice=["adamw", None, [1, 2]]),
        "training.warmup_steps": Distribution(uniform=[3, 4]),
    }
    tuning = TuningSection(space=space, trials=20)
    drawn = draw_candidates(tuning, seed=3)
    assert drawn == draw_candidates(tuning, seed=3) != draw_candidates(tuning, seed=4)
    assert len(drawn) == 40
    assert [c["training.weight_decay"] for c in drawn] == [0.0, 0.1] * 20
    assert all(1e-5 <= c["training.learning_rate"] <= 1e-2 and 3 <= c["training.warmup_steps"] <= 4 for c in drawn)
    assert {c["training.batch_size"] for c in drawn} == {1, 2}
    assert all(c["training.optimizer"] in ("adamw", None, [1, 2]) for c in drawn)


def test_grid_tries_every_combination_once() -> None:
    space = {
        "training.batch_size": Distribution(integer=[1, 3]),
        "training.weight_decay": Distribution(choice=[0.0, 0.1]),
        "training.optimizer": Distribution(grid=["adamw", "muon"]),
    }
    drawn = draw_candidates(TuningSection(space=space, searcher="grid", trials=5), seed=0)
    assert len(drawn) == len({tuple(sorted(c.items())) for c in drawn}) == 12
    # What comes first is what others are compared with: only a search without a scheduler keeps the file's order.
    plain = draw_candidates(TuningSection(space=space, searcher="grid", scheduler="none"), seed=0)
    assert [c["training.batch_size"] for c in plain] == [1] * 4 + [2] * 4 + [3] * 4
    assert drawn != plain and all(point in drawn for point in plain)


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
    path, unseen = write_config(tmp_path, tiny_model, scheduler="none", test="unseen.jsonl"), tmp_path / "unseen.jsonl"
    with pytest.raises(UserError, match=r"tuning\.test: "):
        tune(load_config("tune", path))
    unseen.write_text("".join(json.dumps({"prompt": f"fox {i}!", "answer": "jumps"}) + "\n" for i in range(5)))
    assert not (tmp_path / "search").exists()
    tune(load_config("tune", path, [f"tuning.test={unseen}"]))
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [row["status"] for row in report["trials"]] == ["finished", "finished"]
    assert report["best"]["training.learning_rate"] == 1e-2
    losses = {row["training.learning_rate"]: row["validation_loss"] for row in report["trials"]}
    assert losses[1e-2] < losses[1e-6] - 0.1
    best = (tmp_path / "search" / "trials" / "trial-001" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "search" / "model" / "model.safetensors").read_bytes() == best
    assert re.search(r"^ *best +trial 1,", capsys.readouterr().out, re.MULTILINE)
    assert report["test"]["documents"] == 5 and report["test"]["bits_per_byte"] > 0
    again = f"{tmp_path}/search/best.yaml"
    assert load_config("finetune", again).training.learning_rate == 1e-2


@pytest.mark.slow
def test_trials_of_several_workers_are_stopped_early(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    """Four trials of two workers each: those that are behind the first are cut short, and one has no finite loss.

    The workers of one trial take all CPUs of the cluster: what the second trial left would stop the third.
    """
    path = write_config(tmp_path, tiny_model, max_concurrent=1)
    share = ray_instance.cluster_resources()["CPU"] / 2
    overrides = ["resources.workers=2", f"resources.cpus_per_worker={share}", "training.steps=60"]
    space = "tuning.space={training.learning_rate: {grid: [1.0e-2, 1.0e-7, 2.0e-7, 1.0e+30]}}"
    with most_groups_at_a_time() as most:
        tune(load_config("tune", path, [*overrides, space]))
    assert most() == 1
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [row["status"] for row in report["trials"]] == ["finished", "stopped", "stopped", "failed"]
    assert all(60 > row["step"] > 0 for row in report["trials"][1:3])
    assert "finite" in report["trials"][3]["failure"], report["trials"][3]
    assert report["best"]["training.learning_rate"] == 1e-2
    assert (tmp_path / "search" / "model" / "model.safetensors").is_file()
    # What the stopped trial's workers held is free again.
    assert become_free(seconds=20), holders_of_cpus()


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


@pytest.mark.slow
def test_drawn_candidates_outlive_an_interrupt(tiny_model: Path, tmp_path: Path) -> None:
    """Ctrl-C exports nothing, and what a search draws after it is what it would have drawn."""
    space = {"training.learning_rate": {"log_uniform": [1e-5, 1e-2]}, "training.batch_size": {"choice": [2, 4]}}
    path = write_config(tmp_path, tiny_model, scheduler="none", max_concurrent=1, space=space, trials=3)
    command = ["-m", "raylm.cli", "tune", str(path), "training.steps=40"]
    first = start(*command)
    try:
        wait_until(lambda: (tmp_path / "search" / "trials" / "trial-001" / "metrics.jsonl").exists(), first)
        # Ctrl-C goes to the whole group.
        os.killpg(first.pid, signal.SIGINT)
        output, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert (first.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "raylm: interrupted"
    assert "Traceback" not in errors and "Tuner.restore" not in errors
    assert not {"report.json", "model", ".model.partial"} & {path.name for path in (tmp_path / "search").iterdir()}
    again = start(*command)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors[-2000:]
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [row["step"] for row in report["trials"]] == [40, 40, 40]
    tuning = load_config("tune", path).tuning
    assert [{key: row[key] for key in space} for row in report["trials"]] == draw_candidates(tuning, seed=0)
    # One of Ray Tune's own searches, which went on.
    (search,) = (tmp_path / "search" / "ray-tune").iterdir()
    assert len(list(search.glob("trial-*"))) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"metrics": {}}', "changed", "no model"])
def test_a_damaged_outcome_is_none(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    config = trial_config(load_config("tune", write_config(tmp_path, tiny_model)), {"training.learning_rate": 0.01})
    (tmp_path / "trial-000" / "model").mkdir(parents=True)
    outcome, metrics = Outcome(tmp_path / "trial-000", config), {"step": 12, "validation_loss": 2.0}
    outcome.write(metrics)
    assert outcome.read() == metrics
    path = tmp_path / "trial-000" / "outcome.json"
    if damage == "no model":
        (tmp_path / "trial-000" / "model").rmdir()
    elif damage == "changed":
        path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": [1]}))
    else:
        path.write_text(damage)
    assert outcome.read() is None


def test_a_record_of_a_search_that_was_cut_off_is_not_whole(tmp_path: Path) -> None:
    assert whole_record(tmp_path / "none")
    whole = {
        "experiment_state-2026-01-01_00-00-00.json": b"{",
        "experiment_state-2026-01-02_00-00-00.json": json.dumps({"trial_data": []}).encode(),
        "searcher-state-2026-01-02_00-00-00.pkl": pickle.dumps({"numbers": {}}),
        "search_gen_state-2026-01-02_00-00-00.json": pickle.dumps({"counter": 3}),
        "tuner.pkl": pickle.dumps({"a": 1}),
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    # Only what is read counts: the newest state.
    assert whole_record(tmp_path)
    for name in list(whole)[1:]:
        for cut in (0, 5, len(whole[name]) - 1):
            (tmp_path / name).write_bytes(whole[name][:cut])
            assert not whole_record(tmp_path)
        (tmp_path / name).write_bytes(whole[name])
    assert whole_record(tmp_path)


def test_search_of_an_older_raylm_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_model)
    config = load_config("tune", path)
    saved = config.model_dump(mode="json")
    del saved["tuning"]["budget"]
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "config.yaml").write_text(yaml.safe_dump({"stage": "tune", **saved}))
    with pytest.raises(UserError, match=r"begun by an older raylm.*choose another run\.name to search anew"):
        tune(config)


def test_done_search_of_an_older_raylm_is_shown(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("tune", write_config(tmp_path, tiny_model))
    saved = config.model_dump(mode="json")
    del saved["tuning"]["searcher"]
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "config.yaml").write_text(yaml.safe_dump({"stage": "tune", **saved}))
    row = {"trial": 0, "training.learning_rate": 0.01, "step": 12, "validation_loss": 2.0, "status": "finished"}
    (tmp_path / "search" / "report.json").write_text(json.dumps({"best": row, "trials": [row]}))
    tune(config)
    assert "is done already" in capsys.readouterr().out


@contextlib.contextmanager
def most_groups_at_a_time() -> Iterator[Callable[[], int]]:
    """Watch the placement groups with bundles that hold CPUs; the result gives the most of them at a time."""
    import ray

    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.5):
            groups = ray.util.placement_group_table().values()
            holding = [g for g in groups if g["state"] == "CREATED" and "CPU" in g["bundles"].get(0, {})]
            most = max(most, len(holding))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most
    finally:
        done.set()
        thread.join()


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
        ("tuning.space={run.name: {grid: [a]}}", "found 'run.name', allowed: keys of training, objective, adapter"),
        ("tuning.space={training.learning_rate: {uniform: [2.0, 1.0]}}", "allowed: [low, high] with low < high"),
        ("tuning.space={training.learning_rate: {grid: [-1.0]}}", "training.learning_rate: found -1.0"),
        ("tuning={searcher: tpe, space: {training.steps: {grid: [1]}}}", "tuning.searcher"),
        (
            "tuning={searcher: grid, space: {training.learning_rate: {uniform: [1.0, 2.0]}}}",
            "allowed with grid: choice",
        ),
    ],
)
def test_refused(tiny_model: Path, tmp_path: Path, override: str, expected: str) -> None:
    path = write_config(tmp_path, tiny_model)
    with pytest.raises(UserError) as caught:
        tune(load_config("tune", path, [override]))
    assert expected in str(caught.value)
    assert not (tmp_path / "search").exists()
