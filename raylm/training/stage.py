"""The stages ``pretrain`` and ``finetune``: validate, prepare the data where it is raw, train, report."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster import cluster_capacity, ray_session
from raylm.config.data import TokenizerSection
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import FinetuneConfig, PretrainConfig, TrainConfig
from raylm.data.sources import MANIFEST
from raylm.errors import UserError
from raylm.progress import Activity

if TYPE_CHECKING:
    from raylm.data.labelled import LabelledInput
    from raylm.data.prepare import Input
    from raylm.data.question_sets import QuestionInput
    from raylm.objectives.base import Objective


def pretrain(config: PretrainConfig) -> None:
    """Train a new model; see :func:`run_training`."""
    run_training("pretrain", config)


def finetune(config: FinetuneConfig) -> None:
    """Go on training an existing model; see :func:`run_training`."""
    run_training("finetune", config)


def validate(config: TrainConfig) -> Input | QuestionInput | LabelledInput | None:
    """Refuse what can be seen to be wrong before Ray starts; call once a run, on the driver.

    Returns:
        raw sources, read and checked, for :func:`ensure_data`; None where the data is prepared.

    Raises:
        UserError: one line.
    """
    from raylm.data.prepare import Input, prepared_directory
    from raylm.data.shards import verify_prepared
    from raylm.models.families import check_head
    from raylm.models.loading import load_config, load_tokenizer
    from raylm.parallel.compilation import check_compilation
    from raylm.parallel.plan import check_model

    if config.training.compile:
        check_compilation(config.parallel.zero_stage)
    objective = training_objective(config)
    source = prepared_directory(config.data)
    checked = None
    if objective.reads == "questions":
        checked = check_questions(config, objective)
    elif objective.reads == "labelled":
        checked = check_labelled(config, objective)
    elif source is not None:
        if config.tokenizer is not None:
            raise UserError("tokenizer: leave it out, the prepared data in data.train has its own")
        check_tokenizer(config, verify_prepared(source))
        check_samples(config, source, objective)
    elif (config.run.directory / "data" / MANIFEST).is_file():
        # What an interrupted start of the same run has prepared.
        verify_prepared(config.run.directory / "data")
    else:
        # Reads all of it, so that a bad row is found before anything is written.
        checked = Input(config.data, tokenizer_section(config))
    if config.model.path is not None:
        check_head(load_config(config.model.path), objective.head, config.model.path)
        objective.check_tokenizer(load_tokenizer(config.model.path), config.training.sequence_length, config.model.path)
    # CPUs, GPUs and memory of the cluster are looked at once it is joined.
    check_model(config)
    return checked


def check_questions(config: TrainConfig, objective: Objective) -> QuestionInput | None:
    """The questions of the sources; None where an interrupted start of the same run has prepared them.

    Raises:
        UserError: one line.
    """
    from raylm.data.array_sets import verify_set
    from raylm.data.question_sets import KIND, QuestionInput

    if config.model.path is None:
        raise UserError(f"objective.type: found {objective.name}, which needs a model.path: an encoder to go on from")
    if config.data.augmentation is not None:
        raise UserError(f"data.augmentation: leave it out, it is not for questions (objective.type {objective.name})")
    if (config.run.directory / "data" / MANIFEST).is_file():
        verify_set(config.run.directory / "data", KIND, "extractive_qa")
        return None
    return QuestionInput(config.data)


def check_labelled(config: TrainConfig, objective: Objective) -> LabelledInput | None:
    """The labelled texts of the sources; None where an interrupted start of the same run has prepared them.

    Raises:
        UserError: one line.
    """
    from raylm.data.array_sets import verify_set
    from raylm.data.labelled import KIND, LabelledInput
    from raylm.models.encoders import encoder_task, label_names
    from raylm.models.loading import load_config

    if config.model.path is None:
        raise UserError(f"objective.type: found {objective.name}, which needs a model.path: an encoder to go on from")
    if (config.run.directory / "data" / MANIFEST).is_file():
        verify_set(config.run.directory / "data", KIND, "classification")
        return None
    model = load_config(config.model.path)
    return LabelledInput(config.data, label_names(model) if encoder_task(model) == "classification" else None)


def check_tokenizer(config: TrainConfig, manifest: dict[str, Any]) -> None:
    """Refuse prepared data whose ids are not those of the model that training goes on from.

    Raises:
        UserError: one line.
    """
    if config.model.path is None:
        return
    from raylm.data.tokenizers import reused_hash

    found, expected = manifest["tokenizer_hash"], reused_hash(tokenizer_section(config).path)
    if found != expected:
        raise UserError(
            f"data.train: {', '.join(config.data.train_sources)} was prepared with another tokenizer than that of "
            f"model.path {config.model.path} (hash {found[:12]}, {expected[:12]} is needed); prepare it again with "
            f"tokenizer.path={config.model.path}"
        )


def tokenizer_section(config: TrainConfig) -> TokenizerSection:
    """How raw sources are tokenized: with an existing model's own tokenizer, else as the file says."""
    if config.model.path is not None:
        from raylm.models.loading import resolve_model

        return TokenizerSection(path=resolve_model(config.model.path))
    return config.new_tokenizer


def training_objective(config: TrainConfig) -> Objective:
    """The objective that the file, or else the model's family, says.

    Raises:
        UserError: the model cannot be trained so.
    """
    from raylm.models.loading import load_config
    from raylm.objectives import make_objective

    model_type = config.model.family or load_config(config.model.path).model_type
    return make_objective(config.objective, model_type)


def check_samples(config: TrainConfig, directory: Path, objective: Objective) -> None:
    """Refuse shards that are damaged, too short for the sequence length, or not for the objective.

    Raises:
        UserError: one line.
    """
    for split in ("train", "validation"):
        objective.samples(directory, split, config.training.sequence_length, config.run.seed)


def ensure_data(config: TrainConfig, directory: Path, checked: Any) -> tuple[Path, Path]:
    """Prepare raw sources into ``<run>/data``; returns the data's and the tokenizer's directories.

    Args:
        directory: the run directory.
        checked: what :func:`validate` returned.
    """
    from raylm.data.prepare import prepare_directory, prepared_directory

    reads = training_objective(config).reads
    if reads != "tokens":
        from raylm.models.loading import load_tokenizer

        source = directory / "data"
        if checked is not None:
            tokenizer, length = load_tokenizer(config.model.path), config.training.sequence_length
            if reads == "questions":
                checked.write(source, tokenizer, length, config.objective.overlap)
            else:
                checked.write(source, tokenizer, length)
        return source, source / "tokenizer"
    source = prepared_directory(config.data)
    if source is None:
        source = directory / "data"
        prepare_directory(source, config.data, tokenizer_section(config), checked=checked)
        check_samples(config, source, training_objective(config))
    return source, source / "tokenizer"


def shared_inputs(config: TrainConfig) -> dict[str, Path]:
    """The folders of this machine that every worker reads, by key of the configuration."""
    from raylm.data.prepare import prepared_directory
    from raylm.models.loading import resolve_model

    inputs = {}
    if (source := prepared_directory(config.data)) is not None:
        inputs["data.train"] = source.resolve()
    if config.model.path is not None and (model := Path(resolve_model(config.model.path))).is_dir():
        inputs["model.path"] = model.resolve()
    return inputs


def bits_per_byte(config: TrainConfig, directory: Path, final: dict[str, Any]) -> dict[str, float | int]:
    """The exported model's validation loss in bits per byte of text, with the bytes; empty where only a part counted.

    The windows of the packed validation stream do not overlap, so ``raylm evaluate``, which gives each token more
    context, finds less on the same bytes.
    """
    from raylm.data.shards import TokenShards

    if training_objective(config).name != "causal":
        return {}
    shards = TokenShards(directory, "validation")
    if shards.kind != "documents" or config.training.evaluation_batches is not None:
        return {}
    whole = final["exported_step"] == final["step"]
    loss = final["validation_loss"] if whole else final["best_validation_loss"]
    nats = loss * (shards.token_count - 1)
    return {"bits_per_byte": nats / math.log(2) / shards.byte_count, "validation_bytes": shards.byte_count}


def run_training(stage: str, config: TrainConfig) -> None:
    """Train to the end, or go on where an interrupted start of the same run stopped.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
        RunFailure: the run failed; the same command goes on from its last checkpoint.
    """
    from raylm.training.events import EVENTS
    from raylm.training.metrics import read_metrics
    from raylm.training.mirror import METRICS, SUMMARY, Mirror
    from raylm.training.storage import Storage
    from raylm.training.summary import summarize

    run = RunDirectory(stage, config)
    mirror = Mirror(Storage(config.run.uri), run.path)
    mirror.open_run()
    run.check()
    if (done := run.report()) is not None and done.get("training") == config.training.model_dump(mode="json"):
        print(f"{stage}: {run.path} is done already\n{describe(stage, run, done)}")
        return
    with Activity(f"{stage}: checking the data and the model"):
        checked = validate(config)

    from raylm.models.loading import resolve_model
    from raylm.parallel.plan import apply_layout, check_model, plan_training, recorded
    from raylm.parallel.precision import with_precision
    from raylm.training.launch import exclusive, launch, new_attempt
    from raylm.training.precision import FILE, note_precision, run_precision, slower_in_bf16
    from raylm.training.sharing import check_shared
    from raylm.training.worker import TrainingJob

    with ray_session():
        capacity, (model_config, _) = cluster_capacity(), check_model(config)
        resumed = run.saved() is not None
        precision = run_precision(run, config, model_config, capacity)
        planned = with_precision(config, precision)
        plan = plan_training(planned, capacity)
        layout = plan.layout
        just_measured = bool(precision.times) and not resumed
        slower = "" if just_measured else slower_in_bf16(planned, model_config, capacity)
        for warning in filter(None, (plan.warning, slower)):
            print(f"{stage}: {warning}", file=sys.stderr, flush=True)
        precision = replace(precision, name=layout.precision)
        check_shared(None if config.run.remote else run.path.parent, shared_inputs(config))
        run.create(recorded(planned, layout))
        note_precision(run, precision)
        with exclusive(run.path):
            attempt = new_attempt()
            mirror.own(attempt)
            mirror.send("config.yaml", FILE)
            data_directory, tokenizer_directory = ensure_data(config, run.path, checked)
            mirror.send_data()
            job = TrainingJob(
                config=apply_layout(planned, layout),
                stage=stage,
                directory=run.path,
                storage=config.run.uri,
                data_directory=data_directory,
                tokenizer_directory=tokenizer_directory,
                model_source=resolve_model(config.model.path) if config.model.path else None,
                use_gpu=layout.use_gpu,
                attempt=attempt,
            )
            final = launch(job, config.resources.cpus_per_worker, config.resources.max_failures)
    final |= bits_per_byte(config, data_directory, final)
    run.write_report({**final, "precision": precision.record(), "training": config.training.model_dump(mode="json")})
    (run.path / SUMMARY).write_text(
        summarize(stage, config.run.name, read_metrics(run.path / METRICS), final), encoding="utf-8"
    )
    mirror.send("report.json", SUMMARY, EVENTS)
    print(describe(stage, run, final))


def describe(stage: str, run: RunDirectory, final: dict[str, Any]) -> str:
    """What came of the run, where it lies and what to type next, for people."""
    per_byte = f", {final['bits_per_byte']:.4f} bits per byte of text" if "bits_per_byte" in final else ""
    return (
        f"{stage}: {final['step']:,} steps, {final['tokens']:,} tokens\n"
        f"  result     validation loss {final['validation_loss']:.4f} nats a target{per_byte} (lower is better)\n"
        f"  check      the saved model was loaded again; its logits differ by {final['logits_difference']:.1e}\n"
        f"  model      {run.path / 'model'}\n"
        f"  next       curves on one page: raylm report {run.path}"
    )
