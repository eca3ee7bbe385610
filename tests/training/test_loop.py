"""The training loop without Ray: bad batches, another layout, a damaged checkpoint. Ray's part is in test_stage.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare.stage import prepare_directory
from raylm.training.loop.anomalies import batch_of_step
from raylm.training.reports.events import read_events
from raylm.training.reports.metrics import read_metrics
from tests.training.loops import run_case, run_loops


@pytest.fixture
def odd_lines(ray_instance: object, tmp_path: Path) -> Path:
    """Bytes of lines of which a few are nothing like the others: a batch that holds a part of one has a far higher
    loss."""
    lines = [f"the cat sat on the mat and the cat sat on mat {i}" for i in range(320)]
    lines[40::60] = ["".join(chr(33 + (i * i + 37 * k) % 90) for i in range(60)) for k in range(5)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    data = DataSection(train=str(tmp_path / "lines.txt"), text_unit="line", validation_fraction=0.1)
    prepare_directory(tmp_path / "odd", data, TokenizerSection(type="byte"))
    return tmp_path / "odd"


DIVERGING = ["training.optimizer=sgd", "training.learning_rate=1e30", "training.gradient_clipping=0"]


def test_gradient_that_is_not_finite_stops_the_run(make_run: Callable) -> None:
    run = make_run("diverged", training={"steps": 20}, checkpoint={"every_steps": 1})
    limited = ["run.name=limited", "training.anomalies={policy: skip, limit: 2}"]
    stopped, passed = run_loops(run_case(run.config, *DIVERGING), run_case(run.config, *DIVERGING, *limited))
    assert "the gradient is not finite; training.anomalies.policy is stop; the last" in stopped["failure"]
    assert "policy is skip and the limit is 2; the last checkpoint is step-0000000" in passed["failure"]
    events = read_events(run.metrics.parent.with_name("limited"))
    assert [event["kind"] for event in events] == ["anomaly"] * 2


def test_batch_that_makes_the_loss_jump_is_left_out(make_run: Callable, odd_lines: Path) -> None:
    settings = {
        "data": {"train": str(odd_lines)},
        "training": {
            "steps": 40, "epochs": None, "learning_rate": 0.02, "log_samples": True,
            "anomalies": {"spike_factor": 1.3, "window": 8},
        },
        "checkpoint": {"every_steps": 6},
    }  # fmt: skip
    runs = {policy: make_run(policy, **settings) for policy in ("skip", "roll_back")}
    run_loops(*(run_case(run.config, f"training.anomalies.policy={policy}") for policy, run in runs.items()))
    for policy, run in runs.items():
        state = json.loads((run.metrics.parent / "checkpoints/step-00000040/checkpoint.json").read_text())["state"]
        assert state["anomalies"] >= 1
        sizes = [stop - first for first, stop in state["skipped"]]
        assert all(size == 1 for size in sizes) if policy == "skip" else max(sizes) > 1
        assert len(run.losses()) == 40
        last = {}
        (log,) = (run.metrics.parent / "samples").glob("*.jsonl")
        for line in map(json.loads, log.read_text().splitlines()):
            last[line["step"]] = line["samples"]
        taken = [sample // 4 for step in range(40) for sample in last[step][:1]]
        assert taken == [batch_of_step(step, state["skipped"]) for step in range(40)]


@pytest.mark.slow
def test_runs_go_on_in_another_layout_and_past_damage(make_run: Callable, tmp_path: Path) -> None:
    whole = make_run("whole", training={"steps": 24, "evaluate_every_steps": 12}, checkpoint={"every_steps": 5})
    run_loops(run_case(whole.config, workers=2))
    expected = whole.losses()
    newest = "step-00000024"
    copies = {}
    for name in ("cut", "damaged"):
        shutil.copytree(whole.metrics.parent, tmp_path / name / "whole")
        copies[name] = tmp_path / name / "whole"
    shutil.rmtree(copies["cut"] / "checkpoints" / newest)
    file = next((copies["damaged"] / "checkpoints" / newest).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    # One replica and two tensor-parallel ranks leave two stages for four workers.
    layout = ["parallel.data=1", "parallel.tensor=2", "parallel.pipeline=auto", "parallel.zero_stage=auto"]
    cut, damaged = run_loops(
        run_case(whole.config, f"run.storage={tmp_path}/cut", *layout, "parallel.balance=time", workers=4),
        run_case(whole.config, f"run.storage={tmp_path}/damaged", workers=2),
    )
    found = {name: read_metrics(path / "metrics.jsonl") for name, path in copies.items()}
    assert [line["loss"] for line in found["damaged"]] == expected
    assert [line["loss"] for line in found["cut"]] == pytest.approx(expected, abs=1e-5)
    assert damaged["reports"] == cut["reports"] == [24]
    assert cut["logits_difference"] < 1e-4
    assert all(len(line["stage_idle"]) == 2 for line in found["cut"][20:])
    assert json.loads((copies["cut"] / "stages.json").read_text())["stage_bounds"][0] == 0
    parallel = [yaml.safe_load((path / "config.yaml").read_text())["parallel"] for path in copies.values()]
    names = ("data", "tensor", "pipeline", "zero_stage", "micro_batch_size", "activation_checkpointing")
    chosen = [[sections[name] for name in names] for sections in parallel]
    # So small a model takes as long for four samples as for two: the whole batch goes through both stages at once.
    assert chosen == [[1, 2, 2, 0, 4, False], [2, 1, 1, 1, 2, False]]
