"""The stage ``evaluate``: a model directory and text to cross-entropy, perplexity and bits per byte; a reader and
questions to exact match and F1; a classifier and labelled texts to accuracy and macro-F1; a
tagger and tagged sentences to token accuracy and the F1 of spans."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.cluster.capacity import cluster_capacity, cluster_resources
from raylm.cluster.environment import worker_environment
from raylm.cluster.session import ray_session
from raylm.config.data import DataSection
from raylm.config.evaluation import EvaluationSection
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import EvaluateConfig
from raylm.data.prepare.inputs import check_run_unchanged, note_inputs, run_stamps
from raylm.errors import RunFailure, UserError, first_line
from raylm.evaluation.perplexity import (
    TextStream,
    TransformersScorer,
    batch_arrays,
    figures,
    fixed_batch_size,
    make_stream,
    window_batches,
)
from raylm.interrupts import ended_at_once
from raylm.progress import Activity, ProgressBar

if TYPE_CHECKING:
    from raylm.tasks.base import Arrays, ScoredSet, Task

LONGEST_DEFAULT_WINDOW = 1024


def open_text(data: DataSection, split: str, tokenizer) -> TextStream:
    """The text as the model's own tokens.

    Raises:
        UserError: there is no text.
    """
    from raylm.data.samples.evaluation_texts import evaluation_texts

    stream = make_stream(evaluation_texts(data, split), tokenizer)
    if not stream.document_count:
        raise UserError(f"data: {', '.join(data.train_sources)} has no text in the {split} split")
    return stream


def window_of(section: EvaluationSection, model_config) -> tuple[int, int, int]:
    """Window length, stride and batch size for a model.

    Raises:
        UserError: the window is longer than the model's positions.
    """
    from raylm.models.families.build import check_positions

    positions = getattr(model_config, "max_position_embeddings", None) or LONGEST_DEFAULT_WINDOW
    length = section.sequence_length or min(positions, LONGEST_DEFAULT_WINDOW)
    check_positions(model_config, length, "evaluation.sequence_length")
    stride = section.stride or max(1, length // 2)
    if stride > length:
        raise UserError(f"evaluation.stride: found {stride}, allowed: at most the window ({length})")
    return length, stride, fixed_batch_size(section.batch_size, length, model_config.vocab_size)


class BatchScorer:
    """What one Ray worker holds: the model and the stream; scores one batch a call."""

    def load(self, model_path: str, tokens) -> None:
        """Load the model; not in the constructor, whose exceptions Ray does not hand on as they are."""
        from raylm.models.loading import load_model

        self._score, self._tokens = TransformersScorer(load_model(model_path)), tokens

    def score(self, windows: list[tuple[int, int, int]]) -> float:
        """Summed negative log-likelihood of the batch ``windows``, nats."""
        return self._score(*batch_arrays(self._tokens, windows))


class ExampleScorer:
    """What one Ray worker holds: a model that is scored on examples; one batch of them a call."""

    def load(self, model_path: str, task: str, trusted: bool) -> None:
        """Load the model; not in the constructor, whose exceptions Ray does not hand on as they are."""
        import torch

        from raylm.models.loading import load_config
        from raylm.models.own_heads import usable_head
        from raylm.tasks import find_task

        found = find_task(task)
        head = usable_head(found.head, load_config(model_path), model_path, "model.path", trusted=trusted)
        assert found.evaluation is not None
        self._model = found.evaluation.open_model(model_path, head, torch.get_num_threads())

    def score(self, batch: Arrays) -> np.ndarray:
        """What the model gives, [n, ...]."""
        return self._model.outputs(batch)


def evaluate(config: EvaluateConfig) -> None:
    """Run the stage.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
    """
    run = RunDirectory("evaluate", config)
    run.check()
    report = run.report()
    if report is None:
        if config.model.path is None:
            raise UserError("model.path: missing; evaluate needs an existing model")
        report = measure(config, run)
    else:
        check_run_unchanged(run.path, config.data, config.model.path)
        print(f"evaluate: {run.path} is done already")
    print(f"{describe(report)}\n  report     {run.path / 'report.json'}; as a page: raylm report {run.path}")


def measure(config: EvaluateConfig, run: RunDirectory) -> dict[str, Any]:
    """Write the report of a model that has none yet; makes the run directory once everything is checked.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
    """
    from raylm.data.loading import resolve_model
    from raylm.models.families.build import check_head
    from raylm.models.heads import CAUSAL
    from raylm.models.loading import load_config, load_parts
    from raylm.models.openvino import find_export
    from raylm.models.own_heads import usable_head
    from raylm.tasks import chosen_task

    with Activity("evaluate: reading the model's configuration and the data"), ended_at_once():
        source = resolve_model(config.model.path)
        stamps = run_stamps(config.data, config.model.path)
        model_config = load_config(source)
        task = chosen_task(model_config, config.objective, measured=True)
        check_task(task, config)
        usable_head(task.head, model_config, source, "model.path", trusted=config.model.trust_code)
        if scored := task.evaluation is not None and task.evaluation.results:
            # An export needs no other weights.
            load_parts(source, weights=find_export(source) is None)
            examples = task.evaluation.open(config, source)
        else:
            check_head(model_config, CAUSAL, config.model.path)
            if not task.generates:
                raise UserError(
                    f"model.path: found {config.model.path}, {task.service.what}, allowed: a text generator, a reader, "
                    "a classifier or a tagger"
                )
            _, tokenizer = load_parts(source)
            window = window_of(config.evaluation, model_config)
            stream = open_text(config.data, config.evaluation.split, tokenizer)
    with run.held(resumes=False), ray_session():
        run.create()
        if scored:
            figures = evaluate_examples(source, task, examples, config, run.path)
        else:
            figures = evaluate_stream(source, stream, window, config)
        report = {"model": config.model.path, **figures}
        note_inputs(run.path, stamps)
        run.write_report(report)
    return report


def check_task(task: Task, config: EvaluateConfig) -> None:
    """Refuse an ``objective.type`` that says something else than what the model is for.

    Raises:
        UserError: names the key.
    """
    if config.objective.type not in ("auto", task.name):
        raise UserError(
            f"objective.type: found {config.objective.type}, allowed for {config.model.path}, {task.service.what}: auto"
            f"{', sequence_to_sequence' if task.generates else ''}"
        )
    plain, given = EvaluationSection(), config.evaluation
    if task.name != "sequence_to_sequence":
        for key in ("beams", "new_tokens", "language"):
            if getattr(given, key) != getattr(plain, key):
                raise UserError(
                    f"evaluation.{key}: found {getattr(given, key)}, allowed with objective.type sequence_to_sequence, "
                    f"as {config.model.path} is {task.service.what}"
                )


def describe(report: dict[str, Any]) -> str:
    """The figures of a report as lines of text, for people."""
    from raylm.tasks import all_tasks

    for task in all_tasks():
        if (known := task.evaluation) is not None and known.describe and known.measures[0].key in report:
            return known.describe(report)
    return (
        f"evaluate: {report['model']} on {report['documents']:,} documents, {report['bytes']:,} bytes of text\n"
        f"  perplexity {report['perplexity']:.2f}; cross-entropy {report['cross_entropy']:.4f} nats a token; "
        f"{report['bits_per_byte']:.4f} bits per byte (of all, lower is better)\n"
        f"  speed      {report['tokens_per_second']:,.0f} tokens/s on {workers_text(report['workers'])}; windows of "
        f"{report['sequence_length']:,} tokens, a new one every {report['stride']:,}"
    )


def workers_text(count: int) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{count:,} worker{'s' if count != 1 else ''}"


def evaluate_stream(
    source: str, stream: TextStream, window: tuple[int, int, int], config: EvaluateConfig
) -> dict[str, Any]:
    """Score ``stream`` on Ray workers; the figures do not depend on how many there are."""
    import ray

    length, stride, batch_size = window
    batches = window_batches(len(stream.tokens), length, stride, batch_size)
    shared = ray.put(stream.tokens)
    began = time.perf_counter()
    scorers = start_scorers(BatchScorer, (source, shared), len(batches), config)
    workers = len(scorers)
    nats = score_batches(scorers, batches)
    seconds = time.perf_counter() - began
    return {
        **figures(stream, math.fsum(nats[number] for number in range(len(batches)))),
        "sequence_length": length,
        "stride": stride,
        "workers": workers,
        "seconds": seconds,
        "tokens_per_second": (len(stream.tokens) - 1) / seconds,
    }


def evaluate_examples(
    source: str, task: Task, examples: ScoredSet, config: EvaluateConfig, directory: Path
) -> dict[str, Any]:
    """Score ``examples`` on Ray workers; writes what the model says to each into ``directory``."""
    assert task.evaluation is not None
    began = time.perf_counter()
    scorers = start_scorers(ExampleScorer, (source, task.name, config.model.trust_code), len(examples.batches), config)
    found = score_batches(scorers, examples.batches)
    seconds = time.perf_counter() - began
    outputs = [found[number] for number in range(len(examples.batches))]
    with (directory / task.evaluation.results).open("w", encoding="utf-8") as stream:
        for row in examples.rows(outputs):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        **examples.figures(outputs),
        "workers": len(scorers),
        "seconds": seconds,
        f"{task.evaluation.unit}_per_second": examples.count / seconds,
    }


@contextmanager
def _worker_errors() -> Iterator[None]:
    """A worker's user error as it is, any other failure of a worker as a :class:`RunFailure` of one line."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise RunFailure(
            f"evaluate: a worker failed: {type(error.cause).__name__}: {first_line(error.cause)}"
        ) from error
    except ray.exceptions.RayError as error:
        raise RunFailure(f"evaluate: a worker was lost: {first_line(error)}") from error


def start_scorers(scorer: type, arguments: tuple[Any, ...], batches: int, config: EvaluateConfig) -> list[Any]:
    """Ray workers, each a ``scorer`` whose ``load`` was called with ``arguments``; no more than ``batches``.

    Raises:
        UserError: more are asked for than there are CPUs, or what ``load`` raised.
        RunFailure: a worker failed.
    """
    import ray

    cpus = config.resources.cpus_per_worker
    # A number may ask for nodes that the cluster's autoscaler starts; `auto` takes what is there.
    there, fitting = (
        max(1, int(total / cpus + 1e-9)) for total in (cluster_resources()["CPU"], cluster_capacity().cpus)
    )
    workers = config.resources.workers if config.resources.workers != "auto" else min(there, batches)
    if workers > fitting:
        raise UserError(f"resources.workers: found {workers}, allowed: at most {fitting} with {cpus:g} CPUs each")
    actor = ray.remote(scorer).options(num_cpus=cpus, runtime_env={"env_vars": worker_environment(cpus)})
    scorers = [actor.remote() for _ in range(workers)]
    with _worker_errors(), Activity(f"evaluate: loading the model on {workers_text(workers)}"):
        ray.get([scorer.load.remote(*arguments) for scorer in scorers])
    return scorers


def score_batches(scorers: list[Any], batches: Sequence[Any]) -> dict[int, Any]:
    """What a scorer says of each of ``batches``, by its number; a scorer that is done with one gets the next.

    Raises:
        RunFailure: a worker failed or was lost.
    """
    import ray

    numbers = iter(range(len(batches)))
    waiting = {}
    nats: dict[int, Any] = {}
    with _worker_errors(), ProgressBar("evaluate", len(batches), "batches") as bar:
        # Two batches at each worker, so that none waits for the driver.
        for scorer, number in zip(scorers * 2, numbers, strict=False):
            waiting[scorer.score.remote(batches[number])] = (scorer, number)
        while waiting:
            done, _ = ray.wait(list(waiting))
            scorer, number = waiting.pop(done[0])
            nats[number] = ray.get(done[0])
            bar.update(len(nats))
            if (following := next(numbers, None)) is not None:
                waiting[scorer.score.remote(batches[following])] = (scorer, following)
    return nats
