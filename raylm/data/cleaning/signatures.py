"""Signatures of documents: what duplicates are found by, computed where a document is cleaned.

For each part of the corpus two files: ``keys``, uint64 [1 + bands, documents], a row of hashes of the normalised text
and a row for each band of its MinHash signature (rensa), and ``shingles``, the sorted hashes of each document's
shingles, by which a candidate pair's Jaccard similarity is counted exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from raylm.config.cleaning import DeduplicationSection
from raylm.data.sources.documents import Document
from raylm.data.words import WordTable, compatible, normalized, rolling, runs, words_of

# Texts of one call: bounds the memory that their words take.
BATCH_BYTES = 1 << 20


class Signatures:
    """Collects the signatures of a part's documents and writes them.

    Args:
        section: shingles, permutations, bands.
    """

    def __init__(self, section: DeduplicationSection) -> None:
        self._section = section
        self._table = WordTable()
        self._keys: list[np.ndarray] = []
        self._shingles: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, documents: Sequence[Document], hashes: Sequence[np.ndarray | None] | None = None) -> None:
        """Append documents in their order.

        Args:
            documents: pairs are near to pairs with the same context only, by prompt and answer: else all questions
                about a long passage would be near to each other.
            hashes: of their words where they are known, see :class:`~raylm.data.words.WordTable`.
        """
        begin = size = 0
        for place, document in enumerate(documents, start=1):
            size += len(document.text)
            if size >= BATCH_BYTES or place == len(documents):
                self._add(documents[begin:place], hashes[begin:place] if hashes else [None] * (place - begin))
                begin, size = place, 0

    def _add(self, documents: Sequence[Document], hashes: Sequence[np.ndarray | None]) -> None:
        texts = [document.text for document in documents]
        exact = np.array([xxhash.xxh3_64_intdigest(normalized(text).encode()) for text in texts], dtype=np.uint64)
        if not self._section.near:
            self._keys.append(exact[None])
            return
        self._table.trim()
        words = [
            word_hashes(f"{document.prompt}\n{document.answer}", self._table)
            if document.context
            else word_hashes(document.text, self._table, known)
            for document, known in zip(documents, hashes, strict=True)
        ]
        flat, counts = shingle_sets(words, self._section.shingle_words)
        flat = _apart(flat, counts, [document.context for document in documents])
        self._keys.append(np.concatenate([exact[None], band_keys(flat, counts, self._section)]))
        self._shingles.append(flat)
        self._counts.append(counts)

    def write(self, base: Path) -> None:
        """Write ``<base>.keys.npy`` and, for near duplicates, ``<base>.shingles.npy`` and ``<base>.ends.npy``."""
        save(base.with_suffix(".keys.npy"), np.concatenate(self._keys, axis=1))
        if self._section.near:
            save(base.with_suffix(".shingles.npy"), np.concatenate(self._shingles))
            save(base.with_suffix(".ends.npy"), np.cumsum(np.concatenate(self._counts)))


def word_hashes(text: str, table: WordTable, known: np.ndarray | None = None) -> np.ndarray:
    """Hashes of the words of a text in Unicode's compatibility form, letter case apart; uint64 [words].

    Args:
        text: most are in this form as they stand.
        table: numbers the words.
        known: hashes of the words as they stand, where somebody has computed them already.
    """
    plain = compatible(text)
    if known is not None and plain == text:
        return known
    return table.hashes(table.numbers(words_of(plain)))


def shingle_sets(hashes: Sequence[np.ndarray], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the sorted hashes of its shingles, each once: (uint64, text after text; how many each has, int64).

    A text of fewer than ``words`` words is one shingle; it is near only to what has the same words.
    """
    sizes = np.array([len(each) for each in hashes], dtype=np.int64)
    flat = np.concatenate(hashes)
    ends = np.cumsum(sizes)
    starts = np.arange(len(flat))
    starts = starts[starts + words <= np.repeat(ends, sizes)]
    counts = np.maximum(1, sizes - words + 1)
    found = np.empty(int(counts.sum()), dtype=np.uint64)
    is_short = np.repeat(sizes < words, counts)
    found[~is_short] = runs(flat, starts, words)
    found[is_short] = [rolling(each, len(each))[0] if len(each) else 0 for each in hashes if len(each) < words]
    edges = np.concatenate([[0], np.cumsum(counts)])
    for begin, end in itertools.pairwise(edges.tolist()):
        found[begin:end].sort()
    fresh = np.concatenate([[True], found[1:] != found[:-1]])
    fresh[edges[:-1]] = True
    return found[fresh], np.add.reduceat(fresh, edges[:-1], dtype=np.int64)


def _apart(flat: np.ndarray, counts: np.ndarray, contexts: Sequence[str]) -> np.ndarray:
    """``flat`` of :func:`shingle_sets` with other hashes for every context, so that none are shared by two."""
    if not any(contexts):
        return flat
    keys = [xxhash.xxh3_64_intdigest(normalized(context).encode()) if context else 0 for context in contexts]
    found = flat ^ np.repeat(np.array(keys, dtype=np.uint64), counts)
    # Sorted within each document again.
    return found[np.lexsort([found, np.repeat(np.arange(len(counts)), counts)])]


def shingle_hashes(texts: Sequence[str], words: int) -> list[np.ndarray]:
    """:func:`shingle_sets` of texts, an array a text."""
    table = WordTable()
    flat, counts = shingle_sets([word_hashes(text, table) for text in texts], words)
    return np.split(flat, np.cumsum(counts)[:-1])


def band_keys(flat: np.ndarray, counts: np.ndarray, section: DeduplicationSection) -> np.ndarray:
    """MinHash band keys, uint64 [bands, documents].

    Args:
        flat: all shingle hashes, document after document.
        counts: shingles of each document.
        section: permutations, bands and seed.
    """
    import rensa

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, section.permutations, section.seed)
    digests = np.array(matrix.to_rows(), dtype=np.uint64)
    bands, rows = section.layout
    cut = digests.reshape(len(counts), section.permutations)[:, : bands * rows].reshape(len(counts), bands, rows)
    return np.stack(
        [rolling_rows(cut[:, band]) ^ np.uint64(band * 0x9E3779B97F4A7C15 % 2**64) for band in range(bands)]
    )


def rolling_rows(values: np.ndarray) -> np.ndarray:
    """One hash of each row: uint64 [n, rows] to uint64 [n]."""
    combined = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        combined = (combined ^ column) * np.uint64(0x9E3779B97F4A7C15)
        combined ^= combined >> np.uint64(29)
    return combined


def save(path: Path, values: np.ndarray) -> None:
    """Write an array so that the name stands for a whole file only."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        np.save(stream, values)
    partial.replace(path)
