"""From tokens to the tables of an n-gram model, in numpy.

An n-gram lies within a document: of its tokens only the first may be the end of text, which begins a context, and the
last, which is then predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The n-grams of one order, as :class:`raylm.models.families.ngram.Table` has them."""

    keys: np.ndarray
    first: np.ndarray
    weights: np.ndarray
    rest: np.ndarray


def count_orders(
    tokens: np.ndarray, order: int, vocabulary: int, end: int, smoothing: str
) -> tuple[np.ndarray, list[Order]]:
    """Probabilities of single tokens, fp32 [vocabulary], and the tables of the orders 2 to ``order``."""
    smooth = SMOOTHINGS[smoothing]
    ids = tokens.astype(np.int64)
    # places[k][i]: the place of the k + 1 tokens from i on, in the table of their order; -1 where they are no n-gram.
    places, tables = [ids], []
    for length in range(2, order + 1):
        contexts, last = places[-1][:-1], ids[length - 1 :]
        inside = contexts >= 0
        if length > 2:
            # What was the last token of the context is in the middle now.
            inside = inside & (ids[length - 2 : -1] != end)
        keys, inverse, counts = np.unique(
            contexts[inside] * vocabulary + last[inside], return_inverse=True, return_counts=True
        )
        found = np.full(len(contexts), -1, dtype=np.int64)
        found[inside] = inverse
        places.append(found)
        tables.append((keys, counts))
    singles = np.bincount(ids[1:], minlength=vocabulary)
    if smoothing == "modified_kneser_ney":
        tables, singles = _after_how_many(tables, places, ids, singles, end)
    unigrams = _unigrams(singles, smooth)
    sizes = [vocabulary, *(len(keys) for keys, _ in tables)]
    orders = [
        _table(keys, counts, contexts, vocabulary, smooth)
        for (keys, counts), contexts in zip(tables, sizes, strict=False)
    ]
    return unigrams.astype(np.float32), orders


def _after_how_many(
    tables: list[tuple[np.ndarray, np.ndarray]],
    places: list[np.ndarray],
    ids: np.ndarray,
    singles: np.ndarray,
    end: int,
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Counts of all orders but the highest as the number of different tokens before; the highest keeps its own.

    Nothing comes before an end of text that begins a document: such n-grams keep their counts.
    """
    adjusted = []
    for length, (keys, counts) in enumerate(tables[:-1], start=2):
        # Each n-gram that is one token longer, once; its last tokens are this n-gram.
        starts = _one_start_of_each(places[length], len(tables[length - 1][0]))
        number = np.bincount(places[length - 1][starts + 1], minlength=len(keys))
        begins = np.zeros(len(keys), dtype=bool)
        inside = places[length - 1] >= 0
        begins[places[length - 1][inside]] = ids[: len(inside)][inside] == end
        adjusted.append((keys, np.where(begins, counts, number)))
    if not tables:
        return tables, singles
    starts = _one_start_of_each(places[1], len(tables[0][0]))
    return [*adjusted, tables[-1]], np.bincount(ids[starts + 1], minlength=len(singles))


def _one_start_of_each(places: np.ndarray, entries: int) -> np.ndarray:
    """Where in the stream one occurrence of each n-gram of a table begins, int64 [entries]."""
    (seen,) = np.nonzero(places >= 0)
    starts = np.zeros(entries, dtype=np.int64)
    starts[places[seen]] = seen
    return starts


def _unigrams(counts: np.ndarray, smooth: Smoothing) -> np.ndarray:
    """Probabilities of single tokens, with the uniform distribution as the order below."""
    weights, rest = smooth(counts[counts > 0], np.zeros(int((counts > 0).sum()), dtype=np.int64), 1)
    found = np.full(len(counts), rest[0] / len(counts))
    found[counts > 0] += weights
    return found


def _table(keys: np.ndarray, counts: np.ndarray, contexts: int, vocabulary: int, smooth: Smoothing) -> Order:
    context = keys // vocabulary
    first = np.searchsorted(context, np.arange(contexts + 1))
    weights, rest = smooth(counts, context, contexts)
    return Order(keys, first, weights.astype(np.float32), rest.astype(np.float32))


Smoothing = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""From counts above 0, the context of each and the number of contexts to the probability of each entry beyond that of
the lower order, and the weight of the lower order in each context, 1 in those without an entry."""


def modified_kneser_ney(counts: np.ndarray, context: np.ndarray, contexts: int) -> tuple[np.ndarray, np.ndarray]:
    """Chen and Goodman 1998, equations 26 and 27; a corpus too small for three discounts has one of a half."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    discounts = np.array([0.0, 0.5, 1.0, 1.5])
    if n.all():
        share = n[0] / (n[0] + 2 * n[1])
        estimated = np.arange(1, 4) - np.arange(2, 5) * share * n[1:] / n[:-1]
        if (estimated > 0).all():
            discounts[1:] = estimated
    taken = np.minimum(discounts[np.minimum(counts, 3)], counts)
    total = np.bincount(context, weights=counts, minlength=contexts)
    left = np.bincount(context, weights=taken, minlength=contexts)
    return (counts - taken) / total[context], np.divide(left, total, out=np.ones(contexts), where=total > 0)


def witten_bell(counts: np.ndarray, context: np.ndarray, contexts: int) -> tuple[np.ndarray, np.ndarray]:
    """Witten and Bell 1991, method C, interpolated: what follows in t ways after n tokens is new with t / (n + t)."""
    total = np.bincount(context, weights=counts, minlength=contexts)
    kinds = np.bincount(context, minlength=contexts)
    rest = np.divide(kinds, total + kinds, out=np.ones(contexts), where=total > 0)
    return counts / (total + kinds)[context], rest


SMOOTHINGS: dict[str, Smoothing] = {"modified_kneser_ney": modified_kneser_ney, "witten_bell": witten_bell}
