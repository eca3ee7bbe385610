"""How alike two forms of one model answer: the same labels, losses that go together, vectors in the same direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from raylm.errors import RunFailure
from raylm.tasks.base import ScoredSet

# 8-bit weights move the outputs a little; a broken export moves them altogether.
LEAST_COSINE = 0.95
# A classifier is held to its labels: of few labels, logits move without a change of what is said.
LEAST_AGREEMENT = 0.95
# Weights of few bits move each loss a little; a broken export moves them altogether.
LEAST_CORRELATION = 0.8


def losses_correlation(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """How the losses of all targets by two models go together; of each batch [n, targets].

    Raises:
        RunFailure: they do not.
    """
    losses = [np.concatenate([batch.astype(np.float64).ravel() for batch in one]) for one in (before, after)]
    one, other = (values - values.mean() for values in losses)
    found = float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-12))
    if not found >= LEAST_CORRELATION:
        raise RunFailure(
            f"the export's losses do not agree with the model's: correlation {found:.4f} < {LEAST_CORRELATION}"
        )
    return {"losses_correlation": found}


def label_agreement(scored: ScoredSet, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """Share of the texts that get the same label from both.

    Raises:
        RunFailure: too few do.
    """
    same = np.concatenate([a.argmax(axis=-1) == b.argmax(axis=-1) for a, b in zip(before, after, strict=True)])
    agreed = float(same.mean())
    if not agreed >= LEAST_AGREEMENT:
        raise RunFailure(
            f"the export's labels do not agree with the model's: {agreed:.1%} of the texts get the same label, "
            f"at least {LEAST_AGREEMENT:.0%} must"
        )
    return {"labels_agreement": agreed}


def mean_cosine(
    vector: Callable[[np.ndarray], np.ndarray], what: str
) -> Callable[[ScoredSet, Sequence[np.ndarray], Sequence[np.ndarray]], dict[str, Any]]:
    """The mean and the least cosine over the texts, raising RunFailure where the mean is too low.

    Args:
        vector: from the outputs of a text's tokens, [T, ...], to one vector.
        what: these vectors, in words.
    """

    def closeness(scored: ScoredSet, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
        cosines = np.array(list(_cosines(vector, scored, before, after)))
        mean = float(cosines.mean())
        if not mean >= LEAST_COSINE:
            raise RunFailure(
                f"the export's outputs do not agree with the model's: mean cosine {mean:.4f} < {LEAST_COSINE}"
            )
        return {"outputs_cosine": mean, "outputs_cosine_least": float(cosines.min()), "compared": what}

    return closeness


def _cosines(
    vector: Callable[[np.ndarray], np.ndarray],
    scored: ScoredSet,
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
) -> Iterator[float]:
    for batch, ones, others in zip(scored.batches, before, after, strict=True):
        for mask, *pair in zip(batch["attention_mask"].astype(bool), ones, others, strict=True):
            first, second = (vector(output[mask]) for output in pair)
            norms = np.linalg.norm(first) * np.linalg.norm(second)
            yield float(first @ second / max(norms, 1e-12))
