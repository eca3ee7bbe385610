"""From an encoder through finetune, evaluate and compress, each as the command that a user runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import yaml


def run(stage: str, values: dict, directory: Path) -> dict:
    """A stage's report, and its ``command_seconds``."""
    path = directory / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(values))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "raylm.cli", stage, str(path)], check=True)
    seconds = time.perf_counter() - began
    return json.loads((directory / values["run"]["name"] / "report.json").read_text()) | {"command_seconds": seconds}


def through_stages(
    directory: Path,
    encoder: Path,
    data: dict,
    held_out: dict,
    objective: str,
    training: dict,
    seed: int,
    **parallel: int,
) -> tuple[dict, dict, dict]:
    """The reports of an encoder's fine-tuning on two workers, its evaluation and its compression, in ``directory``.

    Args:
        data: section of the fine-tuning.
        held_out: section of the other two.
        training: what there is to say besides the schedule.
        parallel: keys of the section besides the ZeRO stage.
    """
    storage, tuned = str(directory), {"path": str(directory / "tuned")}
    schedule = {"schedule": "linear", "warmup_steps": 20, "final_learning_rate_fraction": 0.0}
    finetune = {
        "run": {"name": "tuned", "storage": storage, "seed": seed},
        "data": data,
        "model": {"path": str(encoder)},
        "objective": {"type": objective},
        "training": {"weight_decay": 0.01, "betas": [0.9, 0.999], **schedule, **training},
        "parallel": {"zero_stage": 0, **parallel},
        "resources": {"workers": 2},
        "checkpoint": {"every_seconds": None},
    }
    reports = [run("finetune", finetune, directory)]
    for stage in ("evaluate", "compress"):
        values = {"run": {"name": stage, "storage": storage}, "data": held_out, "model": tuned}
        reports.append(run(stage, values, directory))
    tuning, evaluated, compressed = reports
    return tuning, evaluated, compressed
