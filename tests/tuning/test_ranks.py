"""Ranks that stay from one trial to the next: what they leave, and what happens where one dies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raylm.training.loop.worker import TrainingJob
from raylm.training.reports.events import read_events
from raylm.training.reports.metrics import read_metrics
from raylm.tuning.ranks import KeptRanks
from tests.cpus import become_free, holders_of_cpus
from tests.training.loop_process import make_job
from tests.training.loops import run_case, run_loops
from tests.tuning.test_search import write_config


def made_job(directory: Path, model: Path, *overrides: str) -> TrainingJob:
    """As a trial has it, without the search."""
    path = write_config(directory, model)
    values = yaml.safe_load(path.read_text())
    del values["tuning"]
    path.write_text(yaml.safe_dump(values))
    return make_job(run_case(path, *overrides, workers=2, stage="finetune"))


def forks() -> list[psutil.Process]:
    """The ranks that run, of this session's Ray."""

    def is_server(process: psutil.Process) -> bool:
        try:
            return "raylm.tuning.rank_server" in process.cmdline()
        except psutil.Error:  # it has ended
            return False

    servers = filter(is_server, psutil.Process().children(recursive=True))
    return [one for one in servers if is_server(psutil.Process(one.ppid()))]


@pytest.mark.slow
def test_ranks_that_die_start_again(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    """A rank is killed after the first evaluation: training goes on from the last checkpoint, to the same losses."""
    job = made_job(tmp_path, tiny_model, "checkpoint.every_steps=4", "run.name=died")
    kept, seen = KeptRanks(), []

    def on_evaluation(metrics: dict[str, Any]) -> None:
        seen.append(metrics["step"])
        if len(seen) == 2:
            forks()[-1].kill()

    try:
        final = kept.train(job, tmp_path, on_evaluation)
    finally:
        kept.close()
    assert final["exported_step"] == 12 and seen[:2] == [4, 8] and seen[-1] == 12
    (restart,) = [event for event in read_events(job.directory) if event["kind"] == "restart"]
    assert re.search(r"started again after rank \d: its process ended with status -9", restart["text"])
    assert forks() == []
    assert become_free(seconds=20), holders_of_cpus()
    plain, name = tmp_path / "tune.yaml", "plain"
    run_loops(run_case(plain, f"run.name={name}", workers=2, stage="finetune"))
    expected, found = (
        [line["validation_loss"] for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line]
        for run in (tmp_path / name, job.directory)
    )
    assert found == pytest.approx(expected, abs=1e-6)
