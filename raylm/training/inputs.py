"""What a training run reads: checked before anything starts, prepared where it is raw, and shared by all nodes.

In: the configuration. Out: the model's configuration and objective, and the directories of shards and tokenizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.data import TokenizerSection
from raylm.config.stages import TrainConfig
from raylm.data.sources.segments import MANIFEST
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from raylm.data.prepare.stage import Input
    from raylm.parallel.plan.planning import TrainedModel
    from raylm.tasks.objective import Objective
    from raylm.tasks.rows import Rows, RowsWithTexts


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
    from raylm.training.reports.trackers import check_trackers

    check_trackers(config.run.trackers)
    loaded, objective = _open_model(config)
    data = check_data(config, objective, loaded)
    if objective.own_loss is not None or objective.head.own is not None:
        _check_own(config, loaded, objective, len(labels_of(config, data)))
    return Checked(_check_trained(config, loaded, objective), data)


def check_own(config: TrainConfig, labels: int) -> None:
    """Try the loss and the head of the user's own, where there are any, on examples of so many ``labels``.

    Raises:
        UserError: one line.
    """
    _check_own(config, *_open_model(config), labels)


def _check_own(config: TrainConfig, loaded: PretrainedConfig | None, objective: Objective, labels: int) -> None:
    from raylm.tasks.own_loss import check_loss

    if objective.own_loss is not None:
        check_loss(objective.own_loss, labels)
    if objective.head.own is not None:
        import torch

        from raylm.models.own_models import check_own_head

        # Tasks that take one go on from an encoder that exists.
        assert loaded is not None
        precision = config.training.precision
        bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_available())
        check_own_head(objective.head, loaded, labels, bf16=bf16)


def check_trained(config: TrainConfig) -> TrainedModel:
    """The part of :func:`validate` that is about the model and how it is trained; reads no data.

    Raises:
        UserError: one line.
    """
    return _check_trained(config, *_open_model(config))


def _open_model(config: TrainConfig) -> tuple[PretrainedConfig | None, Objective]:
    """The configuration of the model to go on from, if any, and the objective."""
    from raylm.models.loading import load_config
    from raylm.parallel.engines.compilation import check_compilation
    from raylm.tasks import make_objective
    from raylm.training.counting import refuse_counted
    from raylm.training.loop.batches import check_grouping
    from raylm.training.loop.best import check_metrics

    if config.training.compile:
        check_compilation(config.parallel.zero_stage)
    loaded = load_config(config.model.path) if config.model.path is not None else None
    if loaded is not None:
        refuse_counted(loaded.model_type, "model.path", str(config.model.path), "cannot be trained further")
    objective = make_objective(config.objective, loaded.model_type if loaded else config.model.family)
    check_metrics(config.training, objective)
    check_grouping(config.training, objective)
    return loaded, objective


def _check_trained(config: TrainConfig, loaded: PretrainedConfig | None, objective: Objective) -> TrainedModel:
    from raylm.models.adapters import check_adapter
    from raylm.models.families.build import check_head
    from raylm.models.loading import load_parts
    from raylm.parallel.plan.planning import check_model
    from raylm.training.teacher import check_kept, check_teacher, check_tokenizers

    if config.model.path is not None:
        check_head(loaded, objective.head, config.model.path)
        _, tokenizer = load_parts(config.model.path)
        objective.check_tokenizer(tokenizer, config.training.sequence_length, config.model.path)
        if config.adapter is not None:
            check_adapter(config.adapter, loaded, objective.head)
    if config.freezing is not None:
        check_freezing(config, loaded, objective)
        if config.distillation is not None:
            check_teacher(config.distillation, loaded, objective.head)
            check_tokenizers(config.distillation.teacher, config.model.path, "distillation.teacher")
    if config.distillation is not None and config.distillation.top_k is not None:
        check_kept(config.distillation.top_k, objective, config.run)
    # CPUs, GPUs and memory of the cluster are looked at once it is joined.
    model = check_model(config, loaded)
    if config.distillation is not None and loaded is None:
        check_teacher(config.distillation, model.config, objective.head)
    return model


def labels_of(config: TrainConfig, data: Any) -> Sequence[str]:
    """The labels of a task that has some: of rows that were read, or that an earlier start has written."""
    from raylm.data.tokens.shards import read_manifest

    return data.labels if data is not None else read_manifest(config.run.directory / "data")["labels"]


def check_freezing(config: TrainConfig, loaded: PretrainedConfig | None, objective: Objective) -> None:
    """Refuse names and layers that the model does not have.

    Raises:
        UserError: one line.
    """
    from raylm.models.depth import Freezing
    from raylm.models.weights import make_outline
    from raylm.parallel.plan.planning import check_model

    assert config.freezing is not None
    Freezing(config.freezing, make_outline(check_model(config, loaded).config, objective.head).model)


def check_data(config: TrainConfig, objective: Objective, model: PretrainedConfig | None) -> Input | Rows | None:
    """The raw sources, read and checked; None where they are prepared already, and whole.

    Raises:
        UserError: one line.
    """
    from raylm.data.prepare.stage import Input, prepared_directory
    from raylm.data.tokens.shards import verify_prepared

    source, own = prepared_directory(config.data), config.run.directory / "data"
    if objective.rows is not None:
        if model is None and not objective.rows.for_new_models:
            raise UserError(
                f"objective.type: found {objective.name}, which needs a model.path: an encoder to go on from"
            )
        if source is not None and config.tokenizer is not None:
            raise UserError("tokenizer: leave it out, the prepared data in data.train has its own")
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

    found, expected = manifest["tokenizer_hash"], reused_hash(tokenizer_section(config).path, config.data.chat_template)
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
    from raylm.data.loading import resolve_model
    from raylm.data.prepare.inputs import note_inputs, open_inputs, stamps_of
    from raylm.data.prepare.stage import prepare_directory, prepared_directory

    objective, own = checked.model.objective, directory / "data"
    if objective.rows is not None:
        if checked.data is not None:
            stamps = stamps_of(open_inputs(config.data))
            checked.data.write(own, rows_tokenizer(config, checked.data), config.training.sequence_length)
            note_inputs(own, stamps)
        if config.model.path is not None:
            objective.finish_data(own, resolve_model(config.model.path), config.training.sequence_length)
        return own, own / "tokenizer"
    if (source := prepared_directory(config.data)) is not None:
        return source, source / "tokenizer"
    prepare_directory(own, config.data, tokenizer_section(config), checked=checked.data)
    check_samples(config, own, objective)
    return own, own / "tokenizer"


def rows_tokenizer(config: TrainConfig, rows: RowsWithTexts) -> PreTrainedTokenizerBase:
    """The tokenizer that rows are read with: the model's own; of a new model that of the prepared data or of
    ``tokenizer.path``, else one that is trained on the rows.

    Raises:
        UserError: there is none.
    """
    from raylm.data.loading import load_tokenizer
    from raylm.data.prepare.stage import prepared_directory
    from raylm.data.tokens.tokenizers import make_tokenizer

    if config.model.path is not None:
        return load_tokenizer(config.model.path)
    if (source := prepared_directory(config.data)) is not None:
        return load_tokenizer(source / "tokenizer", "data.train")
    section = config.new_tokenizer
    with tempfile.TemporaryDirectory() as directory:
        made = make_tokenizer(section, rows.texts(section.sample_bytes), config.data.chat_template)
        made.save_pretrained(directory)
        return load_tokenizer(directory, "tokenizer")


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
