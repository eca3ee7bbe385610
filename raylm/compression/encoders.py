"""``compress`` for encoders: readers, classifiers and encoders that embed, to int8 weights for OpenVINO.

In: the model directory and what it is measured on: questions of a reader, labelled texts of a classifier, any texts of
another encoder. Out: what stands in the report about before and after: quality, latency and memory.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.models.encoders import Encoder, OpenVinoEncoder, TransformersEncoder

if TYPE_CHECKING:
    from raylm.tasks.base import ScoredSet, Task

BATCH_SIZES = (1, 8)


def compare(task: Task, examples: ScoredSet, source: str, exported: Path, threads: int) -> dict[str, Any]:
    """Quality before and after, and how close the outputs are.

    Raises:
        RunFailure: the export's outputs do not agree with the original's.
    """
    assert task.evaluation is not None
    before = _outputs(TransformersEncoder(source, task.head), examples)
    after = _outputs(OpenVinoEncoder(exported, task.head, threads), examples)
    keys = [measure.key for measure in task.evaluation.measures]

    def quality(outputs: list[np.ndarray]) -> dict[str, float]:
        found = examples.figures(outputs)
        return {key: found[key] for key in keys}

    return {
        "before": quality(before),
        "after": quality(after),
        "closeness": task.evaluation.closeness(examples, before, after),
    }


def _outputs(encoder: Encoder, examples: ScoredSet) -> list[np.ndarray]:
    return [encoder.outputs(batch) for batch in examples.batches]


def latency_job(engine: str, path: str, task: Task, examples: ScoredSet, threads: int) -> dict[str, Any]:
    """What :mod:`raylm.compression.measure_encoder` measures."""
    return {
        "engine": engine,
        "model": path,
        "task": task.name,
        "length": examples.length,
        "vocabulary": examples.vocabulary_size,
        "batch_sizes": list(BATCH_SIZES),
        "threads": threads,
    }


def medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine's rounds as their medians."""
    return {
        "resident_bytes": statistics.median(r["resident_bytes"] for r in found),
        "peak_bytes": statistics.median(r["peak_bytes"] for r in found),
        "latency_milliseconds": {
            batch: statistics.median(r["latency_milliseconds"][batch] for r in found) for batch in map(str, BATCH_SIZES)
        },
    }
