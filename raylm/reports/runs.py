"""A run directory as a report reads it: configuration, metrics, events and report, of any stage, done or not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raylm.config.run_directory import is_held
from raylm.config.stages import STAGES
from raylm.errors import UserError
from raylm.training.reports.events import read_events
from raylm.training.reports.metrics import read_metrics

# Optimizer or schedule -> keys of ``training`` that only others read.
UNUSED_BY_OPTIMIZER = {
    "adamw": ("matrix_learning_rate", "momentum"),
    "muon": (),
    "sgd": ("matrix_learning_rate", "betas", "epsilon"),
}
OF_OTHERS = ("power", "one_cycle", "plateau")
UNUSED_BY_SCHEDULE = {
    "constant": ("final_learning_rate_fraction", "decay_fraction", *OF_OTHERS),
    "cosine": ("decay_fraction", *OF_OTHERS),
    "linear": ("decay_fraction", *OF_OTHERS),
    "polynomial": ("decay_fraction", "one_cycle", "plateau"),
    "wsd": OF_OTHERS,
    "one_cycle": ("decay_fraction", "final_learning_rate_fraction", "power", "plateau"),
    "plateau": ("decay_fraction", "power", "one_cycle"),
}


@dataclass
class Run:
    """What lies in one run directory.

    Attributes:
        label: name of the run on the page, different for each run of a page.
        config: of config.yaml, without the stage.
        report: of report.json; None while the stage is not done.
        metrics: lines of metrics.jsonl, of stages that train.
        events: restarts, anomalies, failures, in order.
        trials: of a search, by number.
        beside: points of other tools for the plots of quality, size and speed.
    """

    path: Path
    stage: str
    label: str
    config: dict[str, Any]
    report: dict[str, Any] | None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    trials: dict[int, Run] = field(default_factory=dict)
    beside: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> str:
        """In one or a few words: done, running, failed, interrupted, not finished."""
        if self.report is not None:
            return "done"
        if is_held(self.path):
            return "running"
        if self.events and self.events[-1]["kind"] in ("failure", "interrupted"):
            return "failed" if self.events[-1]["kind"] == "failure" else "interrupted"
        return "not finished"

    @property
    def wanted_steps(self) -> int | None:
        """Steps that the configuration asks for, where it says so."""
        return (self.config.get("training") or {}).get("steps")


def open_run(path: Path) -> Run:
    """Read the run directory at ``path``.

    Raises:
        UserError: it is none, or a file of it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; allowed: the directory of a run")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: is no run directory (no config.yaml)")
    values = _parsed(path / "config.yaml", yaml.safe_load)
    stage = values.pop("stage", None) if isinstance(values, dict) else None
    if stage not in STAGES:
        raise UserError(f"{path / 'config.yaml'}: found stage '{stage}', allowed: {', '.join(STAGES)}")
    report = _parsed(path / "report.json", json.loads) if (path / "report.json").is_file() else None
    run = Run(
        path, stage, path.resolve().name, values, report, read_metrics(path / "metrics.jsonl"), _events(path, report)
    )
    for directory in sorted((path / "trials").glob("trial-*")) if stage == "tune" else ():
        number = int(directory.name.rpartition("-")[2])
        run.trials[number] = Run(
            directory, "finetune", f"trial {number}", {}, None, read_metrics(directory / "metrics.jsonl"),
            read_events(directory),
        )  # fmt: skip
    return run


def open_runs(paths: list[Path]) -> list[Run]:
    """Several runs, told apart by as much of their paths as that takes.

    Raises:
        UserError: one is no run directory, or is given twice.
    """
    runs = [open_run(path) for path in paths]
    places = [run.path.resolve() for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place}: given twice")
    for run, place in zip(runs, places, strict=True):
        rest = [other for other in places if other is not place]
        depth = 1
        while any(other.parts[-depth:] == place.parts[-depth:] for other in rest):
            depth += 1
        run.label = "/".join(place.parts[-depth:])
    return runs


def _parsed(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: is damaged: {error}") from None


def _events(path: Path, report: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Those that were written down; of a run of an older raylm, the restarts that its report names."""
    if (found := read_events(path)) or report is None:
        return found
    events = []
    for reason in report.get("restarts") or []:
        step = reason.removeprefix("step ").split(",")[0]
        text = f"workers started again after {reason}"
        events.append({"kind": "restart", "step": int(step) if step.isdigit() else 0, "text": text})
    return events


def shown_configuration(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is not set, and without keys that the optimizer or the schedule does not read."""
    training = dict(config.get("training") or {})
    unused = UNUSED_BY_OPTIMIZER.get(training.get("optimizer", ""), ())
    unused += UNUSED_BY_SCHEDULE.get(training.get("schedule", ""), ())
    kept = {key: value for key, value in training.items() if key not in unused}
    return _without_nothing({**config, "training": kept})


def _without_nothing(values: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        shorter = _without_nothing(value) if isinstance(value, dict) else value
        if shorter is not None and shorter != {} and shorter != []:
            found[key] = shorter
    return found


def flat_configuration(config: dict[str, Any]) -> dict[str, str]:
    """Dotted key to value as YAML has it, of :func:`shown_configuration`."""
    found: dict[str, str] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = scalar(value)

    walk(shown_configuration(config), "")
    return found


def scalar(value: Any) -> str:
    """A value as a YAML file has it: ``true``, ``0.001``, ``[1, 2]``."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def differing(runs: list[Run]) -> dict[str, list[str]]:
    """Keys of the configuration that are not alike in all runs, with each run's value; ``""`` where it has none.

    A run's name and place are no difference.
    """
    flat = [{"stage": run.stage, **flat_configuration(run.config)} for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in ("run.name", "run.storage"))
    found = {key: [values.get(key, "") for values in flat] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}
