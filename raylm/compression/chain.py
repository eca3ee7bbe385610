"""The steps of a ``compress`` run one after the other, each in a directory of its own, where a later start finds it.

``<run>/steps/NN-METHOD/`` holds ``made/``, the model that the method wrote, ``training/``, the run of the training that
followed, and ``step.json``, written last: the step is done.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from raylm.compression.methods import Step, Steps
from raylm.compression.methods.base import Candidate, Recovery
from raylm.config.run_directory import read_object, write_atomically
from raylm.progress import Activity

DONE, MADE = "step.json", "made.json"


def run_steps(steps: Steps, candidate: Candidate, directory: Path) -> list[dict[str, Any]]:
    """Take ``candidate`` through all steps; its ``directory`` is then the last one's model.

    Args:
        directory: the run's.

    Returns:
        of each step what the report has: ``method``, ``settings``, ``describe``, ``seconds``, what the method tells,
        and ``model`` or ``export``, where the step made one, as a path below the run.
    """
    found = []
    for step in steps:
        work = directory / "steps" / step.folder
        report = read_object(work / DONE)
        if report is None:
            work.mkdir(parents=True, exist_ok=True)
            report = _run_step(step, candidate, work)
            write_atomically(work / DONE, json.dumps(report, indent=2) + "\n")
        if "model" in report:
            candidate.directory = directory / report["model"]
        if "export" in report:
            candidate.export = directory / report["export"]
        found.append(report)
    return found


def _run_step(step: Step, candidate: Candidate, work: Path) -> dict[str, Any]:
    began, below = time.monotonic(), Path("steps") / step.folder
    report: dict[str, Any] = {
        "method": step.name,
        "settings": step.section.model_dump(mode="json", exclude_none=True),
        "describe": step.describe(),
    }
    recovery = step.method.recovery(step.section, candidate, work)
    if recovery is not None and step.method.exports:
        report |= {"training": _train(candidate, recovery, work), "model": str(below / "training" / "model")}
        candidate.directory = work / "training" / "model"
    told = _make(step, candidate, work)
    report |= told | {"export" if step.method.exports else "model": str(below / "made")}
    if recovery is not None and not step.method.exports:
        candidate.directory = work / "made"
        report |= {"training": _train(candidate, recovery, work), "model": str(below / "training" / "model")}
    return report | {"seconds": time.monotonic() - began}


def _make(step: Step, candidate: Candidate, work: Path) -> dict[str, Any]:
    """What the method makes, in ``work/made``; what it tells."""
    made, partial = work / "made", work / ".made.partial"
    if (told := read_object(work / MADE)) is not None:
        return told
    for leftover in (partial, made):
        shutil.rmtree(leftover, ignore_errors=True)
    with Activity(f"compress: step {step.number}, {step.describe()}"):
        told = step.method.apply(step.section, candidate, partial)
    partial.rename(made)
    write_atomically(work / MADE, json.dumps(told, indent=2) + "\n")
    return told


def _train(candidate: Candidate, recovery: Recovery, work: Path) -> dict[str, Any]:
    """Train the candidate in ``work/training``; the run's last figures."""
    from raylm.training.stage import run_training

    section, learned = recovery.section, recovery.section.distillation
    distillation = None
    # Without anything to learn from it, a teacher would compute for nothing.
    if learned.logits or learned.hidden or learned.attention:
        distillation = learned.model_copy(update={"teacher": learned.teacher or str(candidate.original)})
    config = candidate.material.training(
        candidate.directory, section.training, work / "training", recovery.keys, distillation, recovery.data
    )
    run_training("finetune", config)
    report = read_object(work / "training" / "report.json") or {}
    return {name: report.get(name) for name in ("step", "tokens", "validation_loss")}
