"""``compress`` for encoders: readers, classifiers and encoders that embed, to int8 weights for OpenVINO.

In: the model directory and what it is measured on: questions of a reader, labelled texts of a classifier, any texts of
another encoder. Out: what stands in the report about before and after: quality, latency and memory.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.stages import CompressConfig
from raylm.data.labelled import encode_texts, pad_ids
from raylm.data.windows import pad
from raylm.errors import RunFailure, UserError
from raylm.models.encoders import (
    Encoder,
    EncoderTask,
    OpenVinoEncoder,
    TransformersEncoder,
    encoder_positions,
)
from raylm.models.loading import load_config, load_tokenizer

if TYPE_CHECKING:
    from raylm.evaluation.classification import TextSet
    from raylm.evaluation.reading import QuestionSet

BATCH_SIZES = (1, 8)
DEFAULT_LENGTH = 384
# Texts that an encoder without a task is compared on.
MOST_TEXTS = 256
# 8-bit weights move the outputs a little; a broken export moves them altogether.
LEAST_COSINE = 0.95
# A classifier is held to its labels: of few labels, logits move without a change of what is said.
LEAST_AGREEMENT = 0.95


@dataclass
class Material:
    """What an encoder is measured on.

    Attributes:
        task: of the encoder.
        batches: of token ids and masks, in order.
        figures: quality from the outputs of all batches.
        length: tokens of the texts on which speed is measured.
        vocabulary: of the tokenizer.
    """

    task: EncoderTask
    batches: list[dict[str, np.ndarray]]
    figures: Callable[[list[np.ndarray]], dict[str, float]]
    length: int
    vocabulary: int


def open_material(task: EncoderTask, config: CompressConfig, source: str) -> Material:
    """Read and tokenize what the ``data`` section holds.

    Raises:
        UserError: bad input, or texts that are to be longer than the model's positions.
    """
    positions = encoder_positions(load_config(source))
    tokenizer = load_tokenizer(source)
    if task == "extractive_qa":
        from raylm.evaluation.reading import open_questions

        return _of_questions(open_questions(config, source), len(tokenizer))
    length = config.evaluation.sequence_length or min(positions or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if task == "classification":
        from raylm.evaluation.classification import open_texts

        return _of_labelled(open_texts(config, source), length, len(tokenizer))
    if positions is not None and length > positions:
        raise UserError(
            f"evaluation.sequence_length: found {length}, allowed: at most the model's {positions} positions"
        )
    from raylm.data.evaluation_texts import evaluation_texts

    texts = list(itertools.islice(evaluation_texts(config.data, config.evaluation.split), MOST_TEXTS))
    if not texts:
        sources = ", ".join(config.data.train_sources)
        raise UserError(f"data: {sources} has no text in the {config.evaluation.split} split")
    ids = sorted(encode_texts(tokenizer, texts, length), key=len)
    size = config.evaluation.batch_size
    pad_id = tokenizer.pad_token_id or 0
    batches = [pad_ids(ids[start : start + size], pad_id, length) for start in range(0, len(ids), size)]
    return Material(task, batches, lambda outputs: {}, length, len(tokenizer))


def _of_questions(questions: QuestionSet, vocabulary: int) -> Material:
    batches = [
        pad([questions.windows[number] for number in batch], questions.pad_id, questions.most)
        for batch in questions.batches
    ]

    def figures(outputs: list[np.ndarray]) -> dict[str, float]:
        logits: list[Any] = [None] * len(questions.windows)
        for batch, scores in zip(questions.batches, outputs, strict=True):
            for number, row in zip(batch, scores, strict=True):
                logits[number] = row[: len(questions.windows[number].input_ids)]
        found = questions.figures(questions.answers(logits))
        return {name: found[name] for name in ("exact_match", "f1")}

    return Material("extractive_qa", batches, figures, questions.most, vocabulary)


def _of_labelled(texts: TextSet, length: int, vocabulary: int) -> Material:
    batches = [pad_ids([texts.ids[number] for number in batch], texts.pad_id) for batch in texts.batches]

    def figures(outputs: list[np.ndarray]) -> dict[str, float]:
        logits = np.zeros((len(texts.texts), len(texts.labels)), dtype=np.float32)
        for batch, rows in zip(texts.batches, outputs, strict=True):
            logits[batch] = rows
        found = texts.figures(logits)
        return {name: found[name] for name in ("accuracy", "macro_f1")}

    return Material("classification", batches, figures, length, vocabulary)


def compare(material: Material, source: str, exported: Path, threads: int) -> dict[str, Any]:
    """Quality before and after, and how close the outputs are.

    Of a classifier that is the share of texts with the same label; of others the mean and the least cosine over the
    texts: of a reader between the centred logits, of another encoder between the mean vectors.

    Raises:
        RunFailure: the export's outputs do not agree with the original's.
    """
    before = _run(TransformersEncoder(source, material.task), material)
    after = _run(OpenVinoEncoder(exported, material.task, threads), material)
    closeness = _label_agreement if material.task == "classification" else _mean_cosine
    return {
        "before": material.figures(before),
        "after": material.figures(after),
        "closeness": closeness(material, before, after),
    }


def _label_agreement(material: Material, before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, float]:
    """Share of the texts that get the same label from both."""
    same = np.concatenate([a.argmax(axis=-1) == b.argmax(axis=-1) for a, b in zip(before, after, strict=True)])
    agreed = float(same.mean())
    if not agreed >= LEAST_AGREEMENT:
        raise RunFailure(
            f"the export's labels do not agree with the model's: {agreed:.1%} of the texts get the same label, "
            f"at least {LEAST_AGREEMENT:.0%} must"
        )
    return {"labels_agreement": agreed}


def _mean_cosine(material: Material, before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, float]:
    cosines = np.concatenate(
        [
            _cosines(material.task, batch, one, other)
            for batch, one, other in zip(material.batches, before, after, strict=True)
        ]
    )
    mean = float(cosines.mean())
    if not mean >= LEAST_COSINE:
        raise RunFailure(f"the export's outputs do not agree with the model's: mean cosine {mean:.4f} < {LEAST_COSINE}")
    return {"outputs_cosine": mean, "outputs_cosine_least": float(cosines.min())}


def _run(encoder: Encoder, material: Material) -> list[np.ndarray]:
    return [encoder.outputs(batch) for batch in material.batches]


def _cosines(task: EncoderTask, batch: dict[str, np.ndarray], one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each row's outputs, [rows]; of a reader or an encoder that embeds."""
    rows = []
    for mask, *pair in zip(batch["attention_mask"].astype(bool), one, other, strict=True):
        if task == "embedding":
            vectors = [hidden[mask].mean(axis=0) for hidden in pair]
        else:
            kept = [logits[mask] for logits in pair]
            vectors = [(logits - logits.mean(axis=0)).ravel().astype(np.float64) for logits in kept]
        norms = np.linalg.norm(vectors[0]) * np.linalg.norm(vectors[1])
        rows.append(float(vectors[0] @ vectors[1] / max(norms, 1e-12)))
    return np.array(rows)


def latency_job(engine: str, path: str, material: Material, threads: int) -> dict[str, Any]:
    """What :mod:`raylm.compression.measure_encoder` measures."""
    return {
        "engine": engine,
        "model": path,
        "task": material.task,
        "length": material.length,
        "vocabulary": material.vocabulary,
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
