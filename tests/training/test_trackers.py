"""Trackers with their real packages, where those are installed: offline, and the same run after a restart."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from raylm.errors import UserError
from raylm.training.reports import trackers
from raylm.training.reports.metrics import read_metrics
from raylm.training.reports.trackers import check_trackers, finite_numbers, flattened
from tests.training.loops import run_case, run_loops


def test_numbers_of_sections_are_found() -> None:
    values = {"a": {"b": 1, "c": "x"}, "d": float("nan"), "e": True, "f": [1], "g": 0.5}
    assert dict(flattened(values)) == {"a.b": 1, "a.c": "x", "d": values["d"], "e": True, "f": [1], "g": 0.5}
    assert finite_numbers(values) == {"a.b": 1.0, "g": 0.5}


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"run.trackers: found mlflow, .* python -m pip install mlflow-skinny, or"
    ) as one:
        check_trackers(["mlflow"])
    assert "\n" not in str(one.value)


def run_twice(make_run: Callable, tracker: str) -> tuple[Path, list[dict]]:
    """A run that went on after step 8 of 12, which the tracker saw; its directory and lines."""
    training = {"steps": 8, "evaluate_every_steps": 4}
    run = make_run("tracked", run={"trackers": [tracker]}, training=training, checkpoint={"every_steps": 4})
    run_loops(run_case(run.config), run_case(run.config, "training.steps=12"))
    lines = read_metrics(run.metrics)
    assert [line["step"] for line in lines] == list(range(1, 13))
    # TensorBoard was not asked for.
    assert not (run.metrics.parent / "tensorboard").exists()
    return run.metrics.parent, lines


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")
def test_mlflow_has_the_curves_the_keys_and_the_end(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    directory, lines = run_twice(make_run, "mlflow")
    client = MlflowClient(tracking_uri=(directory / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("raylm").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "tracked"
    assert run.data.params["training.batch_size"] == "4" and run.data.params["model.family"] == "llama"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(line["step"], line["loss"]) for line in lines]
    last = [line["validation_loss"] for line in lines if "validation_loss" in line]
    found = [one.value for one in client.get_metric_history(run.info.run_id, "validation_loss")]
    # The end of the first start was evaluated, too.
    assert found == last and len(found) == 3
    assert run.data.metrics["final/validation_loss"] == last[-1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_has_an_offline_run(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    directory, lines = run_twice(make_run, "wandb")
    files = sorted((directory / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    losses, configured, final = [], set(), {}
    for file in files:
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            configured |= {item.key for item in record.run.config.update}
            values = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            if "loss" in values:
                losses.append((int(values["step"]), float(values["loss"])))
            final |= {item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update}
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert {"training", "model", "objective"} <= configured
    assert float(final["final/validation_loss"]) == pytest.approx(lines[-1]["validation_loss"])
    shutil.rmtree(directory / "wandb")
