"""The stages ``pretrain`` and ``finetune``: validate, prepare the data where it is raw, train, report."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.cluster.capacity import cluster_capacity
from raylm.cluster.session import ray_session
from raylm.config.data import TokenizerSection
from raylm.config.families import is_counted
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import FinetuneConfig, PretrainConfig, TrainConfig
from raylm.data.sources.segments import MANIFEST
from raylm.errors import UserError
from raylm.interrupts import ended_at_once
from raylm.progress import Activity

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.data.prepare.stage import Input
    from raylm.parallel.plan.planning import TrainedModel
    from raylm.tasks.objective import Objective
    from raylm.tasks.rows import Rows
    from raylm.training.checkpoints.mirror import Mirror


def pretrain(config: PretrainConfig) -> None:
    """Train a new model; see :func:`run_training`."""
    run_training("pretrain", config)


def finetune(config: FinetuneConfig) -> None:
    """Go on training an existing model; see :func:`run_training`."""
    run_training("finetune", config)


@dataclass(frozen=True)
class Checked:
    """What a run trains, and on what.

    Attributes:
        model: its configuration and objective.
        data: raw sources, read and checked, for :func:`ensure_data`; None where the data is prepared.
    """

    model: TrainedModel
    data: Input | Rows | None


def validate(config: TrainConfig) -> Checked:
    """Refuse what can be seen to be wrong before Ray starts; call once a run, on the driver.

    Raises:
        UserError: one line.
    """
    from raylm.models.families.build import check_head
    from raylm.models.loading import load_config, load_parts
    from raylm.parallel.engines.compilation import check_compilation
    from raylm.parallel.plan.planning import check_model
    from raylm.tasks import make_objective
    from raylm.training.counting import refuse_counted

    if config.training.compile:
        check_compilation(config.parallel.zero_stage)
    loaded = load_config(config.model.path) if config.model.path is not None else None
    if loaded is not None:
        refuse_counted(loaded.model_type, "model.path", str(config.model.path), "cannot be trained further")
    objective = make_objective(config.objective, loaded.model_type if loaded else config.model.family)
    data = check_data(config, objective, loaded)
    if config.model.path is not None:
        check_head(loaded, objective.head, config.model.path)
        _, tokenizer = load_parts(config.model.path)
        objective.check_tokenizer(tokenizer, config.training.sequence_length, config.model.path)
    # CPUs, GPUs and memory of the cluster are looked at once it is joined.
    return Checked(check_model(config, loaded), data)


def check_data(config: TrainConfig, objective: Objective, model: PretrainedConfig | None) -> Input | Rows | None:
    """The raw sources, read and checked; None where they are prepared already, and whole.

    Raises:
        UserError: one line.
    """
    from raylm.data.prepare.stage import Input, prepared_directory
    from raylm.data.tokens.shards import verify_prepared

    source, own = prepared_directory(config.data), config.run.directory / "data"
    if objective.rows is not None:
        if model is None:
            raise UserError(
                f"objective.type: found {objective.name}, which needs a model.path: an encoder to go on from"
            )
        objective.rows.check(config.data, objective.name)
        if written := objective.rows.written(own, objective.name):
            check_raw_unchanged(config)
        return None if written else objective.rows.read(config.data, model, config.objective)
    if source is not None:
        if config.tokenizer is not None:
            raise UserError("tokenizer: leave it out, the prepared data in data.train has its own")
        check_tokenizer(config, verify_prepared(source))
        check_samples(config, source, objective)
        return None
    if (own / MANIFEST).is_file():
        # What an interrupted start of the same run has prepared.
        check_raw_unchanged(config)
        verify_prepared(own)
        return None
    # Reads all of it, so that a bad row is found before anything is written.
    found = Input(config.data, tokenizer_section(config))
    if not found.survey.documents["validation"]:
        raise UserError(
            f"data.validation_fraction: found {config.data.validation_fraction:g}, which leaves no {found.survey.kind} "
            "for validation; allowed in training: more than 0, or a data.validation source"
        )
    return found


def check_raw_unchanged(config: TrainConfig) -> None:
    """Refuse to go on with what the run has prepared from raw sources where a file of them has changed since.

    Raises:
        UserError: names the file.
    """
    from raylm.data.prepare.inputs import check_unchanged

    # Files of another host, on which a run in a remote storage may go on, have times of their own.
    if not config.run.remote:
        tokenizer = config.model.path or config.new_tokenizer.path
        check_unchanged(config.run.directory / "data", config.data, config.run.directory, tokenizer)


def check_done(config: TrainConfig) -> None:
    """Refuse to take a finished run for one of the data and the model as they are now where one has changed since.

    Raises:
        UserError: names the file.
    """
    from raylm.data.prepare.inputs import check_run_unchanged

    check_raw_unchanged(config)
    # As in check_raw_unchanged.
    if not config.run.remote:
        check_run_unchanged(config.run.directory, config.data, config.model.path)


def check_tokenizer(config: TrainConfig, manifest: dict[str, Any]) -> None:
    """Refuse prepared data whose ids are not those of the model that training goes on from.

    Raises:
        UserError: one line.
    """
    if config.model.path is None:
        return
    from raylm.data.tokens.tokenizers import reused_hash

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
        from raylm.data.loading import resolve_model

        return TokenizerSection(path=resolve_model(config.model.path))
    return config.new_tokenizer


def check_samples(config: TrainConfig, directory: Path, objective: Objective) -> None:
    """Refuse shards that are damaged, too short for the sequence length, or not for the objective.

    Raises:
        UserError: one line.
    """
    for split in ("train", "validation"):
        objective.samples(directory, split, config.training.sequence_length, config.run.seed)


def ensure_data(config: TrainConfig, directory: Path, checked: Checked) -> tuple[Path, Path]:
    """Prepare raw sources into ``<run>/data``; returns the data's and the tokenizer's directories.

    Args:
        directory: the run directory.
        checked: what :func:`validate` returned.
    """
    from raylm.data.loading import load_tokenizer
    from raylm.data.prepare.inputs import note_inputs, open_inputs, stamps_of
    from raylm.data.prepare.stage import prepare_directory, prepared_directory

    objective, own = checked.model.objective, directory / "data"
    if objective.rows is not None:
        if checked.data is not None:
            stamps = stamps_of(open_inputs(config.data))
            checked.data.write(own, load_tokenizer(config.model.path), config.training.sequence_length)
            note_inputs(own, stamps)
        return own, own / "tokenizer"
    if (source := prepared_directory(config.data)) is not None:
        return source, source / "tokenizer"
    prepare_directory(own, config.data, tokenizer_section(config), checked=checked.data)
    check_samples(config, own, objective)
    return own, own / "tokenizer"


def shared_inputs(config: TrainConfig) -> dict[str, Path]:
    """The folders of this machine that every worker reads, by key of the configuration."""
    from raylm.data.loading import resolve_model
    from raylm.data.prepare.stage import prepared_directory

    inputs = {}
    if (source := prepared_directory(config.data)) is not None:
        inputs["data.train"] = source.resolve()
    if config.model.path is not None and (model := Path(resolve_model(config.model.path))).is_dir():
        inputs["model.path"] = model.resolve()
    return inputs


def bits_per_byte(
    config: TrainConfig, objective: Objective, directory: Path, final: dict[str, Any]
) -> dict[str, float | int]:
    """The exported model's validation loss in bits per byte of text, with the bytes; empty where only a part counted.

    The windows of the packed validation stream do not overlap, so ``raylm evaluate``, which gives each token more
    context, finds less on the same bytes.
    """
    from raylm.data.tokens.shards import TokenShards

    if not objective.counts_text:
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
    from raylm.data.prepare.inputs import note_inputs, run_stamps
    from raylm.training.checkpoints.mirror import SUMMARY, Mirror
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.reports.events import EVENTS

    run = RunDirectory(stage, config)
    mirror = Mirror(Storage(config.run.uri), run.path)
    # A mirror is written from here on, a directory only after everything is checked.
    with run.held() if mirror.remote else contextlib.nullcontext():
        mirror.open_run()
        run.check()
        if (done := run.report()) is not None and done.get("training") == config.training.model_dump(mode="json"):
            check_done(config)
            print(f"{stage}: {run.path} is done already\n{describe(stage, run, done)}")
            return
        with Activity(f"{stage}: checking the data and the model"), ended_at_once():
            checked = validate(config)
            stamps = run_stamps(config.data, config.model.path)

        with run.held():
            trainer = _count if is_counted(config.model.family) else _train
            with ray_session():
                trained = trainer(stage, config, checked, run, mirror)
            final = trained.final | bits_per_byte(config, checked.model.objective, trained.data, trained.final)
            (run.path / SUMMARY).write_text(trained.summary(final), encoding="utf-8")
            if not config.run.remote:
                note_inputs(run.path, stamps)
            run.write_report({**final, **trained.facts, "training": config.training.model_dump(mode="json")})
            # The report goes last, here and to the storage: it says that the run is done.
            mirror.send(SUMMARY, EVENTS, "report.json")
    print(describe(stage, run, final))


@dataclass(frozen=True)
class Trained:
    """What a trainer gives back.

    Attributes:
        final: the run's last figures.
        data: directory of the shards.
        summary: from the last figures to the run in words.
        facts: what else the report holds.
    """

    final: dict[str, Any]
    data: Path
    summary: Callable[[dict[str, Any]], str]
    facts: dict[str, Any] = field(default_factory=dict)


Trainer = Callable[[str, TrainConfig, Checked, RunDirectory, "Mirror"], Trained]
"""Makes a model of checked input on the joined cluster, in a run directory that it creates. One trains by gradient, the
other counts."""


def _count(stage: str, config: TrainConfig, checked: Checked, run: RunDirectory, mirror: Mirror) -> Trained:
    """Prepare the data on the joined cluster, and count it here."""
    from raylm.training.counting import count_model, summarize_counting
    from raylm.training.ray_train.launch import new_attempt

    run.create(config)
    mirror.own(new_attempt())
    data_directory, tokenizer_directory = ensure_data(config, run.path, checked)
    run.keep()
    mirror.send("config.yaml")
    mirror.send_data()
    final = count_model(config, run, data_directory, tokenizer_directory)
    mirror.send("model")
    return Trained(final, data_directory, functools.partial(summarize_counting, config.run.name))


def _train(stage: str, config: TrainConfig, checked: Checked, run: RunDirectory, mirror: Mirror) -> Trained:
    """Plan on the joined cluster and train there."""
    from raylm.data.loading import resolve_model
    from raylm.parallel.plan.planning import apply_layout, plan_training, recorded
    from raylm.parallel.plan.precision import with_precision
    from raylm.training.checkpoints.mirror import METRICS
    from raylm.training.loop.worker import TrainingJob
    from raylm.training.precision import FILE, note_precision, run_precision, slower_in_bf16
    from raylm.training.ray_train.launch import launch, new_attempt
    from raylm.training.ray_train.sharing import check_shared
    from raylm.training.reports.metrics import read_metrics
    from raylm.training.reports.summary import summarize

    capacity, model_config = cluster_capacity(), checked.model.config
    resumed = run.saved() is not None
    precision = run_precision(run, config, model_config, capacity)
    planned = with_precision(config, precision)
    plan = plan_training(planned, capacity, checked.model)
    layout = plan.layout
    just_measured = bool(precision.times) and not resumed
    slower = "" if just_measured else slower_in_bf16(planned, model_config, capacity)
    for warning in filter(None, (plan.warning, slower)):
        print(f"{stage}: {warning}", file=sys.stderr, flush=True)
    precision = replace(precision, name=layout.precision)
    check_shared(None if config.run.remote else run.path.parent, shared_inputs(config))
    run.create(recorded(planned, layout))
    note_precision(run, precision)
    attempt = new_attempt()
    mirror.own(attempt)
    # Before the configuration reaches the storage, as it may be taken back here.
    data_directory, tokenizer_directory = ensure_data(config, run.path, checked)
    run.keep()
    mirror.send("config.yaml", FILE)
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

    def summary(final: dict[str, Any]) -> str:
        return summarize(stage, config.run.name, read_metrics(run.path / METRICS), final)

    return Trained(final, data_directory, summary, {"precision": precision.record()})


def describe(stage: str, run: RunDirectory, final: dict[str, Any]) -> str:
    """What came of the run, where it lies and what to type next, for people."""
    counted = "entries" in final
    done = f"{final['tokens']:,} tokens counted" if counted else f"{final['step']:,} steps, {final['tokens']:,} tokens"
    per_byte = f", {final['bits_per_byte']:.4f} bits per byte of text" if "bits_per_byte" in final else ""
    return (
        f"{stage}: {done}\n"
        f"  result     validation loss {final['validation_loss']:.4f} nats a target{per_byte} (lower is better)\n"
        f"  check      the saved model was loaded again; its logits differ by {final['logits_difference']:.1e}\n"
        f"  model      {run.path / 'model'}\n"
        f"  next       {'figures' if counted else 'curves'} on one page: raylm report {run.path}"
    )
