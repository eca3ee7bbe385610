"""The stages ``pretrain`` and ``finetune``: validate, prepare the data where it is raw, train, report."""

from __future__ import annotations

from pathlib import Path

from raylm.cluster import cluster_resources, ray_session
from raylm.config.data import TokenizerSection
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import FinetuneConfig, PretrainConfig, TrainConfig
from raylm.errors import UserError


def pretrain(config: PretrainConfig) -> None:
    """Train a new model; see :func:`run_training`."""
    run_training("pretrain", config)


def finetune(config: FinetuneConfig) -> None:
    """Go on training an existing model; see :func:`run_training`."""
    run_training("finetune", config)


def prepared_source(config: TrainConfig) -> Path | None:
    """The prepared directory that ``data.train`` names, or None where it names raw sources."""
    if len(config.data.train_sources) == 1:
        path = Path(config.data.train_sources[0]).expanduser()
        if (path / "manifest.json").is_file():
            return path.resolve()
    return None


def validate(config: TrainConfig) -> None:
    """Refuse what can be seen to be wrong before Ray starts.

    Raises:
        UserError: one line.
    """
    from raylm.data.prepare import Input
    from raylm.models.families import check_positions
    from raylm.models.loading import load_tokenizer, resolve_model

    source = prepared_source(config)
    if source is not None:
        check_samples(config, source)
    else:
        # Reads all of it, so that a bad row is found before anything is written.
        Input(config.data, tokenizer_section(config))
    if source is not None and config.tokenizer is not None:
        raise UserError("tokenizer: leave it out, the prepared data in data.train has its own")
    if config.model.path is not None:
        from transformers import AutoConfig

        load_tokenizer(config.model.path)
        model_config = AutoConfig.from_pretrained(resolve_model(config.model.path))
        check_positions(model_config, config.training.sequence_length)
    else:
        from raylm.parallel.plan import make_plan

        # CPUs and GPUs of the cluster are checked once it is joined.
        make_plan(config, cpus=1e6, gpus=0.0 if config.resources.gpus_per_worker != 1 else 1e6)


def tokenizer_section(config: TrainConfig) -> TokenizerSection:
    """How raw sources are tokenized: with an existing model's own tokenizer, else as the file says."""
    if config.model.path is not None:
        from raylm.models.loading import resolve_model

        return TokenizerSection(path=resolve_model(config.model.path))
    return config.tokenizer or TokenizerSection()


def check_samples(config: TrainConfig, directory: Path) -> None:
    """Refuse shards that are damaged or too short for the sequence length.

    Raises:
        UserError: one line.
    """
    from raylm.data.samples import open_samples

    for split in ("train", "validation"):
        open_samples(directory, split, config.training.sequence_length, config.run.seed, config.objective.answer_only)


def ensure_data(config: TrainConfig, directory: Path) -> tuple[Path, Path]:
    """Prepare raw sources into ``<run>/data``; returns the data's and the tokenizer's directories."""
    from raylm.data.prepare import prepare_directory

    source = prepared_source(config)
    if source is not None:
        return source, source / "tokenizer"
    target = directory / "data"
    prepare_directory(target, config.data, tokenizer_section(config))
    check_samples(config, target)
    return target, target / "tokenizer"


def run_training(stage: str, config: TrainConfig) -> None:
    """Train to the end, or go on where an interrupted start of the same run stopped.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
        RunFailure: the run failed; the same command goes on from its last checkpoint.
    """
    run = RunDirectory(stage, config)
    run.check()
    if (done := run.report()) is not None and done.get("training") == config.training.model_dump(mode="json"):
        print(f"{stage}: {run.path} is done already (step {done['step']}); model in {run.path / 'model'}")
        return
    validate(config)

    from raylm.models.loading import resolve_model
    from raylm.parallel.plan import apply_layout, make_layout
    from raylm.training.launch import exclusive, launch, new_attempt
    from raylm.training.worker import TrainingJob

    with ray_session():
        cluster = cluster_resources()
        layout = make_layout(config, cluster["CPU"], cluster["GPU"])
        run.create()
        with exclusive(run.path):
            data_directory, tokenizer_directory = ensure_data(config, run.path)
            job = TrainingJob(
                config=apply_layout(config, layout),
                stage=stage,
                directory=run.path,
                data_directory=data_directory,
                tokenizer_directory=tokenizer_directory,
                model_source=resolve_model(config.model.path) if config.model.path else None,
                use_gpu=layout.use_gpu,
                attempt=new_attempt(),
            )
            final = launch(job, config.resources.cpus_per_worker, config.resources.max_failures)
    run.write_report({**final, "training": config.training.model_dump(mode="json")})
    print(
        f"{stage}: {final['step']} steps, {final['tokens']:,} tokens, validation loss {final['validation_loss']:.4f} "
        f"nats; reloaded model's logits differ by {final['logits_difference']:.1e}\n"
        f"  model in {run.path / 'model'}, metrics in {run.path / 'metrics.jsonl'}"
    )
