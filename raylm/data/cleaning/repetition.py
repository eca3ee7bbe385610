"""Documents that repeat themselves: the rules of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1).

Many documents are judged in one go, as numbers of their words in one array; only runs of words that are there twice are
looked at again as longer runs. Of n-grams that are there equally often the longest counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from raylm.data.words import MULTIPLIER, runs

# The largest share of characters, by length of the n-gram.
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20


def gopher_repetition(texts: Sequence[str], numbers: Sequence[np.ndarray], lengths: np.ndarray) -> list[str | None]:
    """Of each text why the rules drop it, or None.

    Args:
        texts: the documents.
        numbers: of each its words, int64; words that are the same have the same number.
        lengths: characters of all their words, one document after the other, int64.
    """
    reasons = [_repeated_parts(text) for text in texts]
    counts = np.array([len(each) for each in numbers], dtype=np.int64)
    flat = np.concatenate(numbers) if len(numbers) else np.empty(0, dtype=np.int64)
    document = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)[document] if len(counts) else document
    totals = np.maximum(1, np.bincount(document, weights=lengths, minlength=len(counts)))
    before = np.concatenate([[0], np.cumsum(lengths)])
    hashes = (flat.astype(np.uint64) + np.uint64(1)) * MULTIPLIER
    hashes ^= hashes >> np.uint64(32)
    # A document's own runs only are the same as each other.
    own = (document.astype(np.uint64) + np.uint64(1)) * MULTIPLIER
    places = np.arange(len(flat))

    def drop(which: np.ndarray, reason: str) -> None:
        for number in which.tolist():
            reasons[number] = reasons[number] or reason

    for length in (*TOP_NGRAMS, *DUPLICATE_NGRAMS):
        places = places[places + length <= ends[places]]
        grams = runs(hashes, places, length) ^ own[places]
        # A stable order has the first of the same ones in front.
        order = np.argsort(grams, kind="stable" if length in DUPLICATE_NGRAMS else None)
        first = np.flatnonzero(np.concatenate([[True], np.diff(grams[order]) != 0])) if len(order) else order
        sizes = np.diff(np.append(first, len(order)))
        several = sizes > 1
        if not several.any():
            break
        if length in TOP_NGRAMS:
            heads = places[order[first[several]]]
            owners, times = document[heads], sizes[several]
            most = np.zeros(len(counts), dtype=np.int64)
            np.maximum.at(most, owners, times)
            characters = times * (before[heads + length] - before[heads])
            over = (times == most[owners]) & (characters > TOP_NGRAMS[length] * totals[owners])
            drop(owners[over], f"most frequent {length}-gram")
        else:
            again = np.repeat(several, sizes)
            again[first] = False
            starts = places[order[again]]
            edges = np.bincount(starts, minlength=len(flat) + 1) - np.bincount(starts + length, minlength=len(flat) + 1)
            covered = np.flatnonzero(np.cumsum(edges)[:-1] > 0)
            repeated = np.bincount(document[covered], weights=lengths[covered], minlength=len(counts))
            drop(np.flatnonzero(repeated > DUPLICATE_NGRAMS[length] * totals), f"repeated {length}-grams")
        # What is not there twice is not there twice with one word more.
        places = np.sort(places[order[np.repeat(several, sizes)]])
    return reasons


def _repeated_parts(text: str) -> str | None:
    for unit, separator, most, most_characters in (
        ("lines", "\n", DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS),
        ("paragraphs", "\n\n", DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        parts = list(filter(None, map(str.strip, text.split(separator))))
        again = len(parts) - len(set(parts))
        if again:
            if again > most * len(parts):
                return f"repeated {unit}"
            counted = Counter(parts)
            if sum(len(part) * (times - 1) for part, times in counted.items()) > most_characters * len(text):
                return f"characters in repeated {unit}"
    return None
