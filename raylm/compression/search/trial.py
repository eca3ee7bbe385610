"""One trial of a search over ways to compress a model: training where the file has it, the steps, and the figures.

In: the file and what the searcher drew. Out: ``<run>/trials/trial-NNN/``, with the model and ``outcome.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from raylm.compression.material import Material
from raylm.compression.methods import Steps
from raylm.compression.stage import Work, open_source, put_in_place, sized
from raylm.config.loading import set_key, validate
from raylm.config.model import ModelSection
from raylm.config.run import LocalRunSection
from raylm.config.run_directory import read_object, write_atomically
from raylm.config.stages import CompressConfig, FinetuneConfig, TuneConfig
from raylm.config.tuning import OBJECTIVES

OUTCOME = "outcome.json"
# A trial is measured once: the search goes on while the machine is as fast as it is.
ROUNDS = 1


def trial_configs(
    config: TuneConfig, candidate: dict[str, Any], directory: Path
) -> tuple[FinetuneConfig | None, CompressConfig]:
    """What a trial in ``directory`` trains, if anything, and how it compresses that.

    Raises:
        UserError: a key does not exist or a value is not allowed.
    """
    values = config.model_dump(mode="json", exclude={"tuning"})
    for key, value in candidate.items():
        if values["training"] is not None and key in ("training.steps", "training.tokens", "training.epochs"):
            values["training"] |= dict.fromkeys(("steps", "tokens", "epochs"))
        set_key(values, key, value)
    values["run"] |= {"storage": str(directory.parent), "name": directory.name}
    values["compression"]["target"] = None
    # Trackers are of training.
    plain = values | {"run": {key: values["run"][key] for key in LocalRunSection.model_fields}}
    compress = validate(CompressConfig, {k: plain[k] for k in CompressConfig.model_fields}, "tuning.space")
    if config.training is None:
        return None, compress
    values["run"] |= {"storage": str(directory), "name": "trained"}
    return validate(FinetuneConfig, {k: values[k] for k in FinetuneConfig.model_fields}, "tuning.space"), compress


def run_trial(candidate: dict[str, Any], config: TuneConfig, directory: Path, data: Path | None) -> dict[str, Any]:
    """Run one trial, or find that it has ended.

    Args:
        data: the prepared set that all trials share; None where no trial reads one.

    Returns:
        the figures of the model as :func:`raylm.compression.stage.sized` has them, and ``OBJECTIVES``.
    """
    finetune, compress = trial_configs(config, candidate, directory)
    asked = compress.model_dump(mode="json", exclude={"run": {"name"}})
    asked["training"] = finetune and finetune.training.model_dump(mode="json")
    if (figures := _known(asked, directory)) is not None:
        return figures
    directory.mkdir(parents=True, exist_ok=True)
    if finetune is not None:
        from raylm.training.stage import run_training

        run_training("finetune", finetune)
        compress = compress.model_copy(update={"model": ModelSection(path=str(finetune.run.directory))})
    figures = _compress(compress, directory, data)
    write_atomically(directory / OUTCOME, json.dumps({"asked": asked, "figures": figures}) + "\n")
    return figures


def _known(asked: dict[str, Any], directory: Path) -> dict[str, Any] | None:
    """The figures of this trial if it has ended, or of another one that was asked for the same; None without.

    A searcher draws the same values again where a space is small.
    """
    for place in (directory, *sorted(directory.parent.glob("trial-*"))):
        found = read_object(place / OUTCOME) or {}
        if found.get("asked") != asked or not (place / "model").is_dir():
            continue
        if place != directory:
            partial = directory / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(place / "model", partial, copy_function=os.link)
            put_in_place(partial, directory / "model")
            write_atomically(directory / OUTCOME, json.dumps(found) + "\n")
        return found["figures"]
    return None


def _compress(config: CompressConfig, directory: Path, data: Path | None) -> dict[str, Any]:
    import torch

    from raylm.tasks import chosen_task

    # An actor of Ray has one thread by default; the search runs one trial at a time.
    torch.set_num_threads(os.cpu_count() or 1)
    source, model_config = open_source(config.model)
    task = chosen_task(model_config, config.objective)
    material, steps = Material(config, task, source), Steps(config)
    if data is not None:
        material.use(data)
    work = Work(config, directory, source, task, steps, material)
    comparison = work.open_comparison(model_config)
    made = work.make()
    work.check_export(comparison, made)
    variant = work.result(made)
    figures = sized(variant, comparison.figures([variant], ROUNDS)[0])
    put_in_place(made.directory, directory / "model")
    return figures | objectives(figures, task)


def objectives(figures: dict[str, Any], task: Any) -> dict[str, float]:
    """``OBJECTIVES`` of a model, all of which are better where they are smaller."""
    if task.evaluation is None:
        quality = figures["bits_per_byte"]
    else:
        measure = task.evaluation.measures[0]
        quality = figures[measure.key] * (1 if measure.better == "smaller" else -1)
    if "tokens_per_second" in figures:
        milliseconds = 1e3 / figures["tokens_per_second"]["1"]
    else:
        milliseconds = figures["latency_milliseconds"]["1"]
    return dict(zip(OBJECTIVES, (quality, figures["weight_bytes"] / 1e6, milliseconds), strict=True))
