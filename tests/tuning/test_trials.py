"""Trials that fail, that are stopped, and what is compared of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylm.config import load_config
from raylm.config.run_directory import RunDirectory
from raylm.config.tuning import Distribution, TuningSection
from raylm.errors import RunFailure, UserError
from raylm.reports.report import write_report
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import finetune
from raylm.tuning.checking import check_space
from raylm.tuning.halving import brackets
from raylm.tuning.progress import trained_so_far
from raylm.tuning.results import best_first, best_of, rows_so_far, trials_table
from raylm.tuning.search import TRIAL, begin, figures_at, note
from raylm.tuning.stage import tune
from tests.cpus import become_free, holders_of_cpus
from tests.reading import write_encoder
from tests.tuning.test_search import write_config

RATE = "training.learning_rate"
LINES = [
    {"step": 2, "validation_loss": 2.0, "validation_accuracy": 0.5},
    {"step": 3},
    {"step": 4, "validation_loss": 1.0, "validation_accuracy": 0.4},
    {"step": 6, "validation_loss": math.nan, "validation_accuracy": 0.3},
]


def tuning(**values: Any) -> TuningSection:
    return TuningSection(space={RATE: Distribution(choice=[0.1, 0.2])}, **values)


def test_figures_are_those_of_the_exported_weights() -> None:
    assert figures_at(LINES, 4, "validation_loss") == {"validation_loss": 1.0}
    assert figures_at(LINES, 2, "validation_accuracy") == {"validation_loss": 2.0, "validation_accuracy": 0.5}
    with pytest.raises(RunFailure, match=r"step 6: validation_loss is nan, no finite number"):
        figures_at(LINES, 6, "validation_accuracy")


def test_the_best_is_best_in_the_metric() -> None:
    rows = [
        {"trial": 0, "validation_loss": 1.0, "validation_accuracy": 0.5, "step": 4, "status": "finished"},
        {"trial": 1, "validation_loss": 2.0, "validation_accuracy": 0.7, "step": 4, "status": "finished"},
        {"trial": 2, "validation_loss": 0.1, "validation_accuracy": 0.9, "step": 2, "status": "stopped"},
        {"trial": 3, "step": 0, "status": "failed", "failure": "no room"},
    ]
    assert best_of(rows, tuning())["trial"] == 0
    accuracy = tuning(metric="validation_accuracy")
    assert best_of(rows, accuracy)["trial"] == 1
    assert best_of(rows, accuracy.model_copy(update={"direction": "min"}))["trial"] == 0
    assert [row["trial"] for row in best_first(rows, "validation_accuracy", minimised=False)] == [1, 0, 2, 3]
    assert trials_table(rows, accuracy).splitlines()[-1].endswith("failed: no room")
    with pytest.raises(RunFailure, match=r"^no trial finished; trial 3: no room$"):
        best_of(rows[2:], tuning())


def test_brackets_follow_from_the_length_of_training(tiny_model: Path, tmp_path: Path) -> None:
    config = load_config("tune", write_config(tmp_path, tiny_model), ["training.steps=64"])
    assert config.training is not None
    # Rungs at 4, 8, 16, 32 and 64 steps.
    assert brackets(tuning(scheduler="hyperband", reduction_factor=2), config.training) == 5
    assert brackets(tuning(scheduler="hyperband"), config.training) == 3
    assert brackets(tuning(scheduler="hyperband", grace_evaluations=100), config.training) == 1


def test_a_directory_of_another_candidate_is_emptied(tmp_path: Path) -> None:
    directory, candidate = tmp_path / "trial-000", {RATE: 0.1}
    begin(directory, candidate)
    (directory / "checkpoint").write_text("half of it")
    begin(directory, candidate)
    assert (directory / "checkpoint").exists()
    begin(directory, {RATE: 0.2})
    assert [path.name for path in directory.iterdir()] == [TRIAL]
    (directory / "metrics.jsonl").write_text(
        "".join(
            json.dumps(line | {"tokens": 1, "samples": 1, "loss": 1.0, "gradient_norm": 1.0, "tokens_per_second": 1.0})
            + "\n"
            for line in LINES[:3]
        )
    )
    (row,) = rows_so_far(tmp_path, tuning())
    assert row == {"trial": 0, RATE: 0.2, "step": 4, "validation_loss": 1.0, "status": "running"}
    look = trained_so_far([row, row | {"trial": 1, "status": "failed", "validation_loss": 0.1}], 5, tuning())
    assert (look.done, look.note) == (8, "2 of 5 trials begun, best validation loss 1.0000 (trial 0)")
    assert [line.split() for line in look.lines.splitlines()] == [
        ["trial", "step", "loss", "learning_rate"],
        ["0", "running", "4", "1", "0.2"],
        ["1", "failed", "4", "0.1", "0.2"],
    ]
    note(directory, {RATE: 0.2}, "stopped")
    assert rows_so_far(tmp_path, tuning())[0]["status"] == "stopped"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tuning.metric=validation_accuracy", "tuning.metric: found validation_accuracy, allowed for objective.type"),
        ("tuning.metric=accuracy", "tuning.metric: found accuracy, allowed without compression: validation_loss"),
        ("tuning.space={adapter.rank: {choice: [4, -1]}}", "adapter.rank: found -1"),
        ("tuning.space={freezing.layers: {choice: [1, 99]}}", "99"),
        ("tuning={searcher: tpe, space: {adapter.rank: {integer: [0, 4]}}}", "adapter.rank: found 0"),
        ("tuning={searcher: nsga2, space: {training.momentum: {choice: [0.9]}}}", "random, grid, tpe"),
        ("tuning.start_from=nowhere", "tuning.start_from: found nowhere, allowed: the run directory of a search"),
        ("tuning.space={model.path: {choice: [nowhere]}}", "nowhere"),
    ],
)
def test_refused_before_anything_starts(tiny_model: Path, tmp_path: Path, override: str, expected: str) -> None:
    path = write_config(tmp_path, tiny_model)
    with pytest.raises(UserError) as caught:
        tune(load_config("tune", path, [override]))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "search").exists()


def test_keys_of_other_sections_may_vary(tiny_model: Path, tmp_path: Path) -> None:
    from raylm.tasks import make_objective

    space = (
        "tuning.space={adapter: {choice: [null, {rank: 4}]}, parallel.zero_stage: {choice: [0, 1]}, "
        "freezing.layers: {choice: [1], when: {adapter: null}}, objective.answer_only: {choice: [true, false]}}"
    )
    config = load_config("tune", write_config(tmp_path, tiny_model), [space, "tuning.searcher=grid"])
    points = check_space(config, make_objective(config.objective, "llama"))
    assert len(points) == 8
    assert sum("freezing.layers" in point for point in points) == 4


@pytest.mark.slow
def test_a_trial_that_fails_is_a_row(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    """One whose weights are no numbers after its first step."""
    path = write_config(tmp_path, tiny_model, scheduler="none", max_concurrent=1)
    space = "tuning.space={training.learning_rate: {grid: [1.0e+30, 1.0e-2]}}"
    tune(load_config("tune", path, [space, "training.evaluate_every_steps=1", "training.steps=3"]))
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    bad, good = report["trials"]
    assert bad["status"] == "failed" and "finite" in bad["failure"]
    assert good["status"] == "finished" and report["best"] == good
    assert (tmp_path / "search" / "model" / "model.safetensors").is_file()
    # The file of the best one trains it again.
    again = load_config("finetune", tmp_path / "search" / "best.yaml")
    assert again.training.learning_rate == 1e-2
    finetune(again)
    repeated = RunDirectory("finetune", again).report()
    assert repeated is not None
    assert repeated["validation_loss"] == pytest.approx(good["validation_loss"], rel=1e-5)


@pytest.mark.slow
def test_where_all_fail_the_reason_is_told_and_the_same_command_tries_again(
    ray_instance, tiny_model: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, tiny_model, scheduler="none")
    space = "tuning.space={training.learning_rate: {grid: [1.0e+30, 9.0e+29]}}"
    config = load_config("tune", path, [space, "training.steps=3"])
    for _ in range(2):
        with pytest.raises(RunFailure, match=r"^no trial finished; trial 0: step 2: the gradient is not finite"):
            tune(config)
        assert not (tmp_path / "search" / "report.json").exists()
        assert not (tmp_path / "search" / "model").exists()


@pytest.mark.slow
def test_a_search_leaves_nothing_behind(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    """Sixteen trials in processes that are used again, some of them stopped early."""
    from ray.util.state import list_actors

    space = {
        RATE: {"log_uniform": [1e-7, 1e-2]},
        "training.optimizer": {"choice": ["adamw", "muon"]},
        "training.matrix_learning_rate": {"log_uniform": [1e-7, 1e-1], "when": {"training.optimizer": "muon"}},
        "adapter": {"choice": [None, {"rank": 2}], "when": {"training.optimizer": "adamw"}},
    }
    path = write_config(tmp_path, tiny_model, space=space, trials=16, searcher="tpe", start=[{RATE: 1e-2}])
    tune(load_config("tune", path, ["training.steps=8", "training.evaluate_every_steps=2"]))
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    ends = [row["status"] for row in report["trials"]]
    assert len(ends) == 16 and ends.count("finished") >= 1 and ends.count("stopped") >= 3
    assert "failed" not in ends, [row.get("failure") for row in report["trials"]]
    assert report["trials"][0][RATE] == 1e-2
    for row in report["trials"]:
        assert (row["training.matrix_learning_rate"] is not None) == (row["training.optimizer"] == "muon")
    assert become_free(seconds=20), holders_of_cpus()
    address = ray_instance.get_runtime_context().gcs_address
    alive = {actor.class_name for actor in list_actors(address) if actor.state == "ALIVE"}
    # Ray Data's, which prepared the data.
    assert alive <= {"_StatsActor", "_AutoscalingCoordinatorActor"}
    states = {group["state"] for group in ray_instance.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


@pytest.mark.slow
def test_classifiers_are_compared_by_their_accuracy(ray_instance, tmp_path: Path) -> None:
    """By that of the weights that each exports, under early stopping those of an earlier step; over two encoders."""
    encoders = [str(write_encoder(tmp_path / name)) for name in ("one", "other")]
    rows = [f"{words},{label}" for label, words in (("person", "anna lives"), ("weather", "much rain fell"))] * 20
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    values = {
        "run": {"name": "search", "storage": str(tmp_path)},
        "data": {"train": str(tmp_path / "texts.csv"), "validation": str(tmp_path / "texts.csv")},
        "model": {"path": encoders[0]},
        "objective": {"type": "classification"},
        "training": {
            "steps": 12, "batch_size": 4, "sequence_length": 16, "evaluate_every_steps": 2, "log_every_steps": 1,
            "early_stopping": {"metric": "validation_accuracy", "patience": 2},
        },
        "tuning": {
            "searcher": "grid", "metric": "validation_accuracy", "scheduler": "median",
            "space": {RATE: {"choice": [1e-7, 1e-2, 1e30]}, "model.path": {"choice": encoders}},
        },
        "resources": {"workers": 1},
    }  # fmt: skip
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(values))
    tune(load_config("tune", tmp_path / "tune.yaml"))
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    ends = {(row["model.path"], row[RATE]): row["status"] for row in report["trials"]}
    assert len(ends) == 6
    assert all((end == "failed") == (rate == 1e30) for (_, rate), end in ends.items())
    finished = [row for row in report["trials"] if row["status"] == "finished"]
    assert report["best"]["validation_accuracy"] == max(row["validation_accuracy"] for row in finished) == 1.0
    assert report["best"][RATE] == 1e-2
    for row in finished:
        lines = read_metrics(tmp_path / "search" / "trials" / f"trial-{row['trial']:03d}" / "metrics.jsonl")
        assert row["validation_accuracy"] == max(line.get("validation_accuracy", 0.0) for line in lines)
    assert any(row["step"] < 12 for row in finished)
    page = write_report([tmp_path / "search"]).read_text()
    assert "All keys" in page and "validation accuracy" in page
