"""Signatures of documents: what duplicates are found by, computed where a document is cleaned.

For each part of the corpus two files: ``keys``, uint64 [1 + bands, documents], a row of hashes of the normalised text
and a row for each band of its MinHash signature (rensa), and ``shingles``, the sorted hashes of each document's
shingles, by which a candidate pair's Jaccard similarity is counted exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from raylm.config.cleaning import DeduplicationSection
from raylm.data.words import normalized, rolling, words_of

# Texts of one call: bounds the memory that their words take.
BATCH_BYTES = 1 << 20


class Signatures:
    """Collects the signatures of a part's documents and writes them.

    Args:
        section: shingles, permutations, bands.
    """

    def __init__(self, section: DeduplicationSection) -> None:
        self._section = section
        self._keys: list[np.ndarray] = []
        self._shingles: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, texts: Sequence[str]) -> None:
        """Append documents in their order."""
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                self._add(batch)
                batch, size = [], 0
        if batch:
            self._add(batch)

    def _add(self, texts: list[str]) -> None:
        plain = [normalized(text) for text in texts]
        exact = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in plain], dtype=np.uint64)
        if not self._section.near:
            self._keys.append(exact[None])
            return
        shingles = shingle_hashes(plain, self._section.shingle_words)
        counts = np.array([len(row) for row in shingles], dtype=np.int64)
        flat = np.concatenate(shingles)
        self._keys.append(np.concatenate([exact[None], band_keys(flat, counts, self._section)]))
        self._shingles.append(flat)
        self._counts.append(counts)

    def write(self, base: Path) -> None:
        """Write ``<base>.keys.npy`` and, for near duplicates, ``<base>.shingles.npy`` and ``<base>.ends.npy``."""
        save(base.with_suffix(".keys.npy"), np.concatenate(self._keys, axis=1))
        if self._section.near:
            save(base.with_suffix(".shingles.npy"), np.concatenate(self._shingles))
            save(base.with_suffix(".ends.npy"), np.cumsum(np.concatenate(self._counts)))


def shingle_hashes(texts: Sequence[str], words: int) -> list[np.ndarray]:
    """Of each text the sorted hashes of its shingles, uint64, each once.

    A text of fewer than ``words`` words is one shingle; it is near only to what has the same words.
    """
    import rensa

    rows = []
    for hashed in rensa.RMinHash.hash_token_sets([words_of(text) for text in texts]):
        hashes = np.array(hashed, dtype=np.uint64)
        if len(hashes) < words:
            hashes = rolling(hashes, len(hashes)) if len(hashes) else np.zeros(1, dtype=np.uint64)
        else:
            hashes = rolling(hashes, words)
        rows.append(np.unique(hashes))
    return rows


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
