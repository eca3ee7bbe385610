"""Cross-entropy of a causal model over a sliding window.

In: a stream of token ids and a function that scores a batch. Out: the summed negative log-likelihood. The stream is
every document followed by the end-of-text token, after one end-of-text token as the first context; each token after
that first one is counted exactly once, end-of-text tokens included, with at least ``length - stride`` tokens of
context from the second window on. Windows are grouped into batches by their number alone and sums are made in float64
in the order of the batches, so that the figure does not depend on how many workers share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

IGNORED = -100
# Logits of one batch, in elements: 2**27 is half a gigabyte in fp32.
MOST_LOGITS = 2**27

Score = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class TextStream:
    """Text as a model sees it.

    Attributes:
        tokens: int64 [N]; tokens[0] is context only.
        byte_count: UTF-8 bytes of the documents, without the end-of-text tokens.
        document_count: documents.
    """

    tokens: np.ndarray
    byte_count: int
    document_count: int


def make_stream(texts: Iterable[str], tokenizer) -> TextStream:
    """Tokenize ``texts`` with a Hugging Face ``tokenizer`` and join them by its end-of-text token."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    parts, size, count = [np.array([end])], 0, 0
    for text in texts:
        parts.append(np.array([*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end]))
        size += len(text.encode())
        count += 1
    return TextStream(np.concatenate(parts).astype(np.int64), size, count)


def window_batches(token_count: int, length: int, stride: int, batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Windows over a stream as (start, stop, first counted target), grouped into batches.

    A window's inputs are tokens ``start`` to ``stop - 1`` and its targets the tokens one further on.
    """
    windows, counted, start = [], 1, 0
    while counted < token_count:
        stop = min(start + length, token_count - 1)
        windows.append((start, stop, counted))
        counted = stop + 1
        start += stride
    return [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]


def batch_arrays(tokens: np.ndarray, windows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """``input_ids`` and ``targets``, int64 [windows, longest], of one batch; padded on the right, targets -100."""
    longest = max(stop - start for start, stop, _ in windows)
    inputs = np.zeros((len(windows), longest), dtype=np.int64)
    targets = np.full((len(windows), longest), IGNORED, dtype=np.int64)
    for row, (start, stop, counted) in enumerate(windows):
        inputs[row, : stop - start] = tokens[start:stop]
        targets[row, counted - 1 - start : stop - start] = tokens[counted : stop + 1]
    return inputs, targets


def fixed_batch_size(batch_size: int, length: int, vocab_size: int) -> int:
    """``batch_size``, or fewer where a batch's logits would take too much memory."""
    return max(1, min(batch_size, MOST_LOGITS // (length * vocab_size)))


def score_stream(stream: TextStream, score: Score, length: int, stride: int, batch_size: int) -> float:
    """Summed negative log-likelihood of ``stream``, nats, on this process alone."""
    batches = window_batches(len(stream.tokens), length, stride, batch_size)
    return math.fsum(score(*batch_arrays(stream.tokens, batch)) for batch in batches)


def figures(stream: TextStream, nats: float) -> dict[str, float]:
    """Cross-entropy (nats a token), perplexity and bits per byte from the summed ``nats`` of ``stream``."""
    targets = len(stream.tokens) - 1
    return {
        "cross_entropy": nats / targets,
        "perplexity": math.exp(nats / targets),
        "bits_per_byte": nats / math.log(2) / stream.byte_count,
        "tokens": targets,
        "bytes": stream.byte_count,
        "documents": stream.document_count,
    }


def summed_nats(logits: np.ndarray, targets: np.ndarray) -> float:
    """Negative log-likelihood, nats, of ``targets`` [windows, time] by ``logits`` fp32 [windows, time, vocabulary]."""
    import torch
    from torch.nn import functional

    losses = functional.cross_entropy(
        torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=IGNORED,
        reduction="none",
    )  # fmt: skip
    return float(losses.double().sum())


class TransformersScorer:
    """Scores batches with a transformers model in fp32."""

    def __init__(self, model) -> None:
        self.model = model.eval()

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """``input_ids`` int64 [rows, time] to logits fp32 [rows, time, vocabulary]."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.from_numpy(input_ids), use_cache=False).logits.float().numpy()

    def __call__(self, input_ids: np.ndarray, targets: np.ndarray) -> float:
        """Summed negative log-likelihood, nats, of ``targets`` [windows, time] after ``input_ids``."""
        return summed_nats(self.logits(input_ids), targets)
