"""The stage ``compress``: a model through its compression steps to an export, and the comparison of before and after.

What generates text is compared by bits per byte and greedy output; for encoders see :mod:`raylm.compression.encoders`.

``<run>/model`` is the original Hugging Face directory with the export in its ``openvino/`` folder; the stage succeeds
only after the export was loaded again and its logits were compared with the original's.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.cluster.environment import inherited_environment
from raylm.compression.measure import BATCH_SIZES
from raylm.compression.methods import Steps
from raylm.compression.methods.base import Candidate
from raylm.compression.table import table
from raylm.config.families import is_counted
from raylm.config.run_directory import RunDirectory
from raylm.config.stages import CompressConfig
from raylm.data.prepare.inputs import check_run_unchanged, note_inputs, run_stamps
from raylm.errors import RunFailure, UserError
from raylm.evaluation.perplexity import TextStream, TransformersScorer, figures, score_stream
from raylm.interrupts import ended_at_once, insistent
from raylm.models.heads import CAUSAL, Head
from raylm.progress import Activity, ProgressBar

if TYPE_CHECKING:
    from raylm.tasks.base import Evaluation, Task

ROUNDS = 3
MEASURE_SECONDS = 900.0
# 8-bit weights move the logits a little; a broken export moves them altogether.
LEAST_COSINE = 0.98


def compress(config: CompressConfig) -> None:
    """Run the stage.

    Raises:
        UserError: configuration or input is wrong; nothing was started.
        RunFailure: the export's logits do not agree with the original's, or measuring failed.
    """
    from raylm.data.loading import resolve_model
    from raylm.models.loading import load_config, load_parts
    from raylm.tasks import task_of

    run = RunDirectory("compress", config)
    run.check()
    if (report := run.report()) is not None:
        check_run_unchanged(run.path, config.data, config.model.path)
        print(f"compress: {run.path} is done already\n{table(report)}\n{_next(run)}")
        return
    if config.model.path is None:
        raise UserError("model.path: missing; compress needs an existing model")
    source = resolve_model(config.model.path)
    if not Path(source).is_dir():
        raise UserError(f"model.path: {config.model.path} is not on disk; download the model first")
    model_config = load_config(source)
    if is_counted(model_config.model_type):
        raise UserError(
            f"model.path: found {config.model.path}, whose family {model_config.model_type} is counted and has no "
            "weights to compress; allowed: a model that was trained by gradient"
        )
    task, steps = task_of(model_config), Steps(config.compression.steps)
    steps.check(task.head)
    load_parts(source)
    stamps = run_stamps(config.data, source)
    with run.held(resumes=False):
        if task.evaluation is not None:
            report = _compress_encoder(task, task.evaluation, source, config, run)
        else:
            report = _compress_generator(source, config, run)
        note_inputs(run.path, stamps)
        run.write_report(report)
    print(
        f"compress: {config.model.path} to {steps.describe()}, {report['threads']} CPU threads\n"
        f"{table(report)}\n{_next(run)}"
    )


def _next(run: RunDirectory) -> str:
    return (
        f"  model      {run.path / 'model'} (with the form that OpenVINO runs in openvino/)\n"
        f"  next       the comparison as a page: raylm report {run.path}"
    )


def _compress_generator(source: str, config: CompressConfig, run: RunDirectory) -> dict[str, Any]:
    """The report of a model that generates text."""
    from raylm.data.loading import load_tokenizer
    from raylm.evaluation.stage import open_text, window_of
    from raylm.models.families.build import check_positions
    from raylm.models.loading import load_model

    with Activity("compress: loading the model and the text"), ended_at_once():
        tokenizer = load_tokenizer(source)
        model = load_model(source)
        window = window_of(config.evaluation, model.config)
        check_positions(
            model.config,
            config.compression.prompt_tokens + config.compression.new_tokens,
            "compression.prompt_tokens + compression.new_tokens",
        )
        stream = open_text(config.data, config.evaluation.split, tokenizer)
        prompts = take_prompts(stream, config.compression.prompts, config.compression.prompt_tokens)
    run.create()

    partial, applied = _compressed_copy(source, run, config, CAUSAL)
    threads = os.cpu_count() or 1
    with Activity("compress: comparing the outputs of both models") as activity:
        scorer = _compare_logits(model, partial, prompts)
        activity.change("compress: measuring bits per byte before")
        before = figures(stream, score_stream(stream, TransformersScorer(model), *window))
        activity.change("compress: measuring bits per byte after")
        after = figures(stream, score_stream(stream, scorer[0], *window))
    measured = _measure(
        {"transformers": source, "openvino": str(partial)}, prompts, config.compression.new_tokens, threads
    )
    _replace_model(partial, run)
    outputs = measured["transformers"].pop("outputs"), measured["openvino"].pop("outputs")
    return {
        "model": config.model.path,
        "steps": applied.steps,
        "threads": threads,
        "logits_cosine": scorer[1],
        "before": {
            "engine": "transformers fp32",
            "weight_bytes": _size(Path(source), "*.safetensors"),
            **measured["transformers"],
            "bits_per_byte": before["bits_per_byte"],
        },
        "after": {
            "engine": applied.engine,
            "weight_bytes": _size(run.path / "model" / "openvino", "openvino_model.bin"),
            **measured["openvino"],
            "bits_per_byte": after["bits_per_byte"],
        },
        "greedy_agreement": agreement(*outputs),
    }


def _compress_encoder(
    task: Task, evaluation: Evaluation, source: str, config: CompressConfig, run: RunDirectory
) -> dict[str, Any]:
    """The report of a model that reads and does not generate."""
    from raylm.compression import encoders

    with Activity("compress: reading the data"), ended_at_once():
        examples = evaluation.open(config, source)
    run.create()
    partial, applied = _compressed_copy(source, run, config, task.head)
    threads = os.cpu_count() or 1
    with Activity("compress: comparing the outputs of both models"):
        compared = encoders.compare(task, examples, source, partial, threads)
    paths = {"transformers": source, "openvino": str(partial)}
    rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in paths}
    with _measuring(paths) as bar:
        for _ in range(ROUNDS):
            for engine, path in paths.items():
                job = encoders.latency_job(engine, path, task, examples, threads)
                rounds[engine].append(_measure_once(job, "raylm.compression.measure_encoder"))
                bar.update(bar.done + 1)
    _replace_model(partial, run)
    return {
        "model": config.model.path,
        "task": task.name,
        "steps": applied.steps,
        "threads": threads,
        "sequence_length": examples.length,
        **compared["closeness"],
        "before": {
            "engine": "transformers fp32",
            "weight_bytes": _size(Path(source), "*.safetensors"),
            **encoders.medians(rounds["transformers"]),
            **compared["before"],
        },
        "after": {
            "engine": applied.engine,
            "weight_bytes": _size(run.path / "model" / "openvino", "openvino_model.bin"),
            **encoders.medians(rounds["openvino"]),
            **compared["after"],
        },
    }


def _measuring(models: dict[str, str]) -> ProgressBar:
    """Over the processes that measure, one for each engine and round."""
    return ProgressBar("compress: measuring speed and memory", ROUNDS * len(models), "measurements")


@dataclass(frozen=True)
class _Applied:
    """What was done to the model: the steps for the report, and the engine that runs it, in words."""

    steps: list[dict[str, Any]]
    engine: str


def _compressed_copy(source: str, run: RunDirectory, config: CompressConfig, head: Head) -> tuple[Path, _Applied]:
    """The compressed model with the export in its ``openvino/``, not yet under its own name."""
    partial = run.path / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("openvino"))
    candidate, steps = Candidate(partial, head), Steps(config.compression.steps)
    with Activity(f"compress: making {steps.describe()} (OpenVINO)"), insistent():
        from raylm.compression.exporters import openvino

        reports = steps.apply(candidate)
        openvino.export_model(partial, partial / "openvino", head, candidate.weight_bits)
    return partial, _Applied(reports, openvino.describe(candidate.weight_bits))


def _replace_model(partial: Path, run: RunDirectory) -> None:
    shutil.rmtree(run.path / "model", ignore_errors=True)
    partial.rename(run.path / "model")


def take_prompts(stream: TextStream, count: int, length: int) -> list[list[int]]:
    """``count`` prompts of ``length`` tokens, evenly spaced over the text.

    Raises:
        UserError: the text is too short.
    """
    room = len(stream.tokens) - length
    if room < count:
        raise UserError(
            f"compression.prompts: found {count} prompts of {length} tokens, allowed: fewer or "
            f"shorter ones, as the text has {len(stream.tokens)} tokens"
        )
    starts = np.linspace(0, room, count, dtype=np.int64)
    return [stream.tokens[start : start + length].tolist() for start in starts]


def agreement(before: list[list[int]], after: list[list[int]]) -> dict[str, float]:
    """How greedy outputs agree: share of equal tokens up to the first difference, and of identical outputs."""
    same = 0
    for one, other in zip(before, after, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return {
        "tokens_before_first_difference": same / sum(len(one) for one in before),
        "identical_outputs": statistics.mean(one == other for one, other in zip(before, after, strict=True)),
    }


def _compare_logits(model, directory: Path, prompts: list[list[int]]) -> tuple[Any, float]:
    import torch

    from raylm.compression.exporters.openvino import OpenVINOScorer

    scorer = OpenVINOScorer(directory, os.cpu_count() or 1)
    ids = np.array(prompts, dtype=np.int64)
    with torch.inference_mode():
        expected = model.eval()(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    found = scorer.logits(ids)
    centred = [x - x.mean(axis=-1, keepdims=True) for x in (expected, found)]
    cosine = float((centred[0] * centred[1]).sum() / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    if not cosine >= LEAST_COSINE:
        raise RunFailure(f"the export's logits do not agree with the model's: cosine {cosine:.4f} < {LEAST_COSINE}")
    return scorer, cosine


def _measure(models: dict[str, str], prompts: list[list[int]], new_tokens: int, threads: int) -> dict[str, Any]:
    """Medians of interleaved rounds, each in a fresh process."""
    rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in models}
    with _measuring(models) as bar:
        for _ in range(ROUNDS):
            for engine, path in models.items():
                job = {
                    "engine": engine, "model": path, "prompts": prompts, "new_tokens": new_tokens, "threads": threads,
                }  # fmt: skip
                rounds[engine].append(_measure_once(job))
                bar.update(bar.done + 1)
    return {
        engine: {
            "resident_bytes": statistics.median(r["resident_bytes"] for r in found),
            "peak_bytes": statistics.median(r["peak_bytes"] for r in found),
            "tokens_per_second": {
                batch: statistics.median(r["tokens_per_second"][batch] for r in found)
                for batch in map(str, BATCH_SIZES)
            },
            "outputs": found[0]["outputs"],
        }
        for engine, found in rounds.items()
    }


def _measure_once(job: dict[str, Any], module: str = "raylm.compression.measure") -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "job.json"
        path.write_text(json.dumps(job))
        environment = inherited_environment() | {
            "OMP_NUM_THREADS": str(job["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        result = subprocess.run(
            [sys.executable, "-m", module, str(path)],
            env=environment, capture_output=True, text=True, timeout=MEASURE_SECONDS,
        )  # fmt: skip
    if result.returncode:
        raise RunFailure(f"measuring {job['engine']} failed: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def _size(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern))
