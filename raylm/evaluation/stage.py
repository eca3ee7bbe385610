"""The stage ``evaluate``: a model directory and text to cross-entropy, perplexity and bits per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from raylm.cluster import cluster_resources, ray_session, worker_environment
from raylm.config.data import DataSection
from raylm.config.evaluation import EvaluationSection
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import EvaluateConfig
from raylm.errors import UserError
from raylm.evaluation.perplexity import (
    TextStream,
    TransformersScorer,
    batch_arrays,
    figures,
    fixed_batch_size,
    make_stream,
    window_batches,
)
from raylm.progress import ProgressBar

LONGEST_DEFAULT_WINDOW = 1024


def read_texts(data: DataSection, split: str) -> Iterator[str]:
    """Texts to evaluate on: a prepared directory's ``split``, or every document of raw ``data.train`` sources."""
    from raylm.data.documents import read_documents
    from raylm.data.prepare import prepared_directory
    from raylm.data.sources import open_sources

    if (directory := prepared_directory(data)) is not None:
        documents = read_documents(directory, split)
    else:
        sources = open_sources(data, data.train_sources, "data.train")
        documents = (document for source in sources for document in source.documents())
    for document in documents:
        yield document.text


def open_text(data: DataSection, split: str, tokenizer) -> TextStream:
    """The text as the model's own tokens.

    Raises:
        UserError: there is no text.
    """
    stream = make_stream((text for text in read_texts(data, split) if text), tokenizer)
    if not stream.document_count:
        raise UserError(f"data.train: {', '.join(data.train_sources)} has no text in the {split} split")
    return stream


def window_of(section: EvaluationSection, model_config) -> tuple[int, int, int]:
    """Window length, stride and batch size for a model.

    Raises:
        UserError: the window is longer than the model's positions.
    """
    from raylm.models.families import check_positions

    positions = getattr(model_config, "max_position_embeddings", None) or LONGEST_DEFAULT_WINDOW
    length = section.sequence_length or min(positions, LONGEST_DEFAULT_WINDOW)
    check_positions(model_config, length, "evaluation.sequence_length")
    stride = section.stride or max(1, length // 2)
    if stride > length:
        raise UserError(f"evaluation.stride: found {stride}, allowed: at most the window ({length})")
    return length, stride, fixed_batch_size(section.batch_size, length, model_config.vocab_size)


def score_share(model_path: str, tokens, batches: list, numbers: list[int]) -> list[tuple[int, float]]:
    """What one Ray worker does: load the model, score its batches; (batch number, nats) of each."""
    from raylm.models.loading import load_model

    scorer = TransformersScorer(load_model(model_path))
    return [(number, scorer(*batch_arrays(tokens, batches[number]))) for number in numbers]


def evaluate(config: EvaluateConfig) -> None:
    """Run the stage.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
    """
    from transformers import AutoConfig

    from raylm.models.loading import load_tokenizer, resolve_model

    run = RunDirectory("evaluate", config)
    run.check()
    report = run.report()
    if report is None:
        if config.model.path is None:
            raise UserError("model.path: missing; evaluate needs an existing model")
        source = resolve_model(config.model.path)
        tokenizer = load_tokenizer(source)
        window = window_of(config.evaluation, AutoConfig.from_pretrained(source))
        stream = open_text(config.data, config.evaluation.split, tokenizer)
        with ray_session():
            run.create()
            report = {"model": config.model.path, **evaluate_stream(source, stream, window, config)}
        run.write_report(report)
    print(
        f"evaluate: {report['model']} on {report['documents']:,} documents, {report['bytes']:,} bytes: cross-entropy "
        f"{report['cross_entropy']:.4f} nats a token, perplexity {report['perplexity']:.2f}, "
        f"{report['bits_per_byte']:.4f} bits per byte\n"
        f"  window {report['sequence_length']}, stride {report['stride']}, {report['tokens_per_second']:,.0f} tokens/s "
        f"on {report['workers']} workers; report in {run.path / 'report.json'}"
    )


def evaluate_stream(
    source: str, stream: TextStream, window: tuple[int, int, int], config: EvaluateConfig
) -> dict[str, Any]:
    """Score ``stream`` on Ray workers; the figures do not depend on how many there are."""
    import ray

    length, stride, batch_size = window
    batches = window_batches(len(stream.tokens), length, stride, batch_size)
    cpus = config.resources.cpus_per_worker
    fitting = max(1, int(cluster_resources()["CPU"] / cpus + 1e-9))
    workers = config.resources.workers if config.resources.workers != "auto" else min(fitting, len(batches))
    if workers > fitting:
        raise UserError(f"resources.workers: found {workers}, allowed: at most {fitting} with {cpus:g} CPUs each")
    task = ray.remote(score_share).options(num_cpus=cpus, runtime_env={"env_vars": worker_environment(cpus)})
    shared, plan = ray.put(stream.tokens), ray.put(batches)
    began = time.perf_counter()
    waiting = [task.remote(source, shared, plan, list(range(w, len(batches), workers))) for w in range(workers)]
    nats: dict[int, float] = {}
    with ProgressBar("evaluate", len(batches), "batches") as bar:
        while waiting:
            done, waiting = ray.wait(waiting)
            nats |= dict(ray.get(done[0]))
            bar.update(len(nats))
    seconds = time.perf_counter() - began
    return {
        **figures(stream, math.fsum(nats[number] for number in range(len(batches)))),
        "sequence_length": length,
        "stride": stride,
        "workers": workers,
        "seconds": seconds,
        "tokens_per_second": (len(stream.tokens) - 1) / seconds,
    }
