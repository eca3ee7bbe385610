"""Averages of the weights in whole runs: what is evaluated is what is exported, and a resumed run repeats the bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from raylm.config.training import EmaSection
from raylm.data.samples.opening import open_samples
from raylm.training.loop.averages import decay_at
from raylm.training.reports.metrics import read_metrics
from tests.training.loops import run_case, run_loops


def test_the_average_follows_faster_in_the_beginning() -> None:
    section = EmaSection(decay=0.99)
    assert [decay_at(section, step) for step in (1, 10, 10**6)] == [2 / 11, 0.55, 0.99]
    assert decay_at(EmaSection(decay=0.99, warmup=False), 1) == 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "best"), [(1, False), (3, True)])
def test_what_is_evaluated_is_exported(
    make_run: Callable, prepared: Path, tmp_path: Path, zero: int, best: bool
) -> None:
    training = {"steps": 20, "evaluate_every_steps": 5, "ema": {"decay": 0.9}, "learning_rate": 0.05 if best else 0.01,
                "restore_best": best}  # fmt: skip
    run = make_run("whole", training=training, checkpoint={"every_steps": 7})
    run.config.write_text(run.config.read_text().replace("zero_stage: 1", f"zero_stage: {zero}"))
    parts = [f"run.storage={tmp_path}/parts"]
    (found,) = run_loops(run_case(run.config, workers=2))
    whole = run.metrics.parent
    # As if it had been killed after step 14.
    shutil.copytree(whole, tmp_path / "parts" / "whole")
    checkpoints = tmp_path / "parts" / "whole" / "checkpoints"
    for path in checkpoints.glob("step-*"):
        if int(path.name[5:]) > 14:
            shutil.rmtree(path)
    if best and not (checkpoints / (checkpoints / "BEST").read_text().strip()).is_dir():
        (checkpoints / "BEST").unlink()
    run_loops(run_case(run.config, *parts, workers=2))
    lines = read_metrics(run.metrics)
    resumed = read_metrics(tmp_path / "parts" / "whole" / "metrics.jsonl")
    for key in ("step", "loss", "validation_loss"):
        assert [line.get(key) for line in resumed] == [line.get(key) for line in lines]
    line = next(line for line in lines if line["step"] == found["exported_step"])
    model = AutoModelForCausalLM.from_pretrained(whole / "model").eval()
    samples = open_samples(prepared, "validation", 32, 0, True, False, False)
    total = count = 0
    for number in range(samples.count):
        batch = {
            name: torch.from_numpy(values) for name, values in samples.batch(torch.tensor([number]).numpy()).items()
        }
        with torch.inference_mode():
            logits = model(batch["input_ids"]).logits.flatten(0, 1)
        total += float(functional.cross_entropy(logits, batch["targets"].flatten(), reduction="sum"))
        count += int((batch["targets"] != -100).sum())
    assert total / count == pytest.approx(line["validation_loss"], abs=1e-5)
    same = {path.name: path.read_bytes() for path in (whole / "model").glob("*.safetensors")}
    assert same == {p.name: p.read_bytes() for p in (tmp_path / "parts" / "whole" / "model").glob("*.safetensors")}
