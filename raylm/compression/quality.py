"""How well one form of a text generator predicts text."""

from __future__ import annotations

from typing import Any

import numpy as np

from raylm.evaluation.perplexity import TransformersScorer, batch_arrays, window_batches

# Positions on which whole distributions are compared; there are as many numbers in each as the vocabulary has tokens.
DIVERGENCE_TOKENS = 1024


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Score ``job``: engine, model, reference (a model directory or null), texts, threads.

    A text is ``tokens`` (an .npy file, int64 [N]), ``length``, ``stride`` and ``batch_size`` of its windows, and
    ``most``, the targets that are counted (or null).

    Returns:
        ``nats``, for each text the summed loss of each batch of windows; ``divergence``, the mean over positions of the
        first text of KL(reference || model), nats, or None without a reference; ``ran``, how an engine computed.
    """
    logits = _open(job["engine"], job["model"], job["threads"])
    divergence, texts = None, [(np.load(text["tokens"]), text) for text in job["texts"]]
    if job["reference"] is not None:
        divergence = _divergence(logits, _open("transformers", job["reference"], job["threads"]), *texts[0])
    nats = [_nats(logits, tokens, text) for tokens, text in texts]
    return {"divergence": divergence, "nats": nats, "ran": getattr(logits, "ran", None)}


def _open(engine: str, model: str, threads: int) -> Any:
    if engine == "openvino":
        from raylm.compression.exporters.openvino import OpenVINOScorer

        return OpenVINOScorer(model, threads)
    import torch

    from raylm.models.loading import load_model

    torch.set_num_threads(threads)
    return TransformersScorer(load_model(model))


def chosen_windows(
    count: int, length: int, stride: int, batch_size: int, most: int | None
) -> list[list[tuple[int, int, int]]]:
    """Batches of windows over ``count`` tokens with some ``most`` targets, evenly spaced; None for all."""
    batches = window_batches(count, length, stride, batch_size)
    if most is None or count <= most:
        return batches
    kept = max(1, round(len(batches) * most / count))
    return [batches[number] for number in np.linspace(0, len(batches) - 1, kept).round().astype(int)]


def _batches(tokens: np.ndarray, text: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    windows = chosen_windows(len(tokens), text["length"], text["stride"], text["batch_size"], text["most"])
    return [batch_arrays(tokens, batch) for batch in windows]


def _nats(scorer: Any, tokens: np.ndarray, text: dict[str, Any]) -> list[float]:
    return [scorer(*batch) for batch in _batches(tokens, text)]


def _divergence(model: Any, reference: Any, tokens: np.ndarray, text: dict[str, Any]) -> float:
    """Mean of KL(reference || model) over the first positions, nats."""
    total, count = 0.0, 0
    for input_ids, targets in _batches(tokens, text | {"batch_size": 1}):
        counted = targets >= 0
        found, expected = (model.logits(input_ids)[counted], reference.logits(input_ids)[counted])
        total += summed_divergence(found, expected)
        count += int(counted.sum())
        if count >= DIVERGENCE_TOKENS:
            break
    return total / max(1, count)


def summed_divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Sum over rows of KL(reference || model), nats, of logits fp32 [rows, vocabulary]."""
    import torch

    found, expected = (torch.from_numpy(one).log_softmax(dim=-1) for one in (logits, reference))
    return float((expected.exp() * (expected - found)).sum(dim=-1).double().sum())
