"""Duplicates over the whole corpus, from the signatures of its parts, in tasks that hold a bounded share of the keys.

A task takes one row of the keys (the text's hash, or a band) and one range of their values, so it sees every document
that can be a duplicate there. A document is dropped where an earlier one has the same text, or shares a band and has
a Jaccard similarity of ``threshold`` or more, counted on the shingles themselves. Which one is earlier, the order of
parts and rows says, so the result depends on no worker count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raylm.config.cleaning import DeduplicationSection
from raylm.data.cleaning.signatures import save

# Documents whose keys one task sorts, about 100 bytes each: a sixteenth of them all within these bounds, as each task
# reads all keys of its row to find its own.
FEWEST_TASK_DOCUMENTS, TASK_DOCUMENTS = 1 << 18, 4 << 20
SMALL_TASK_DOCUMENTS = 1 << 20
# Shingles that are compared in one go.
CHUNK_SHINGLES = 1 << 20
# Earlier documents of the same band that a document is compared with.
MOST_COMPARISONS = 8
FOLDER = "duplicates"


class Keys:
    """The key files of all parts as one matrix [rows, documents].

    Files are mapped into memory for a look-up at a time: what stays mapped would count as memory of the task.

    Args:
        parts: their names without suffix, in order.
        counts: documents of each part.
    """

    def __init__(self, parts: Sequence[Path], counts: Sequence[int]) -> None:
        self._parts = list(parts)
        self._first = np.cumsum([0, *counts])

    def _map(self, part: int, name: str) -> np.ndarray:
        path = self._parts[part].with_suffix(f".{name}.npy")
        # An empty array cannot be mapped.
        return np.load(path, mmap_mode="r" if path.stat().st_size > 256 else None)

    def row(self, row: int, share: int, shares: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys, numbers of their documents) of one row whose key falls into ``share`` of ``shares``."""
        keys, numbers = [], []
        for part in range(len(self._parts)):
            found = np.asarray(self._map(part, "keys")[row])
            chosen = np.flatnonzero(found % np.uint64(shares) == share) if shares > 1 else np.arange(len(found))
            keys.append(found[chosen])
            numbers.append(chosen + self._first[part])
        return np.concatenate(keys), np.concatenate(numbers)

    def _by_part(self, documents: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(part, which of ``documents`` are in it, their places in it)."""
        parts = np.searchsorted(self._first, documents, side="right") - 1
        order = np.argsort(parts, kind="stable")
        found, begins = np.unique(parts[order], return_index=True)
        for part, here in zip(found.tolist(), np.split(order, begins[1:]), strict=True):
            yield part, here, documents[here] - self._first[part]

    def columns(self, documents: np.ndarray, rows: slice) -> np.ndarray:
        """Keys of some documents, uint64 [rows, documents]."""
        found: np.ndarray | None = None
        for part, here, places in self._by_part(documents):
            values = self._map(part, "keys")[rows][:, places]
            if found is None:
                found = np.empty((len(values), len(documents)), dtype=np.uint64)
            found[:, here] = values
        return found if found is not None else np.empty((0, 0), dtype=np.uint64)

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """How many shingles some documents have, int64 [documents]."""
        found = np.empty(len(documents), dtype=np.int64)
        for part, here, places in self._by_part(documents):
            ends = self._map(part, "ends")
            found[here] = ends[places] - np.where(places > 0, ends[places - 1], 0)
        return found

    def shingles(self, documents: np.ndarray) -> list[np.ndarray]:
        """The sorted shingle hashes of some documents."""
        found: dict[int, np.ndarray] = {}
        for part, here, places in self._by_part(documents):
            ends, values = self._map(part, "ends"), self._map(part, "shingles")
            for which, place in zip(here.tolist(), places.tolist(), strict=True):
                found[which] = np.array(values[ends[place - 1] if place else 0 : ends[place]])
        return [found[which] for which in range(len(documents))]

    def similarities(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Jaccard similarity of each pair of documents, float64 [pairs]; of a bounded number of shingles at a time."""
        if not len(left):
            return np.empty(0)
        documents, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        sizes = self.sizes(documents)[places]
        chunks = np.cumsum(sizes[: len(left)] + sizes[len(left) :]) // CHUNK_SHINGLES
        found = []
        for pairs in np.split(np.arange(len(left)), np.flatnonzero(np.diff(chunks)) + 1):
            chosen, places = np.unique(np.concatenate([left[pairs], right[pairs]]), return_inverse=True)
            shingles = self.shingles(chosen)
            sides = zip(places[: len(pairs)].tolist(), places[len(pairs) :].tolist(), strict=True)
            found += [jaccard(shingles[one], shingles[other]) for one, other in sides]
        return np.array(found)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Size of the intersection of two sorted sets of hashes over that of their union."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def duplicate_jobs(section: DeduplicationSection, documents: int) -> list[dict[str, Any]]:
    """What the tasks are for: rows of the keys, one after the other, and a share of their values."""
    rows = ([0] if section.exact else []) + (list(range(1, section.layout[0] + 1)) if section.near else [])
    most = min(TASK_DOCUMENTS, max(FEWEST_TASK_DOCUMENTS, documents // 16))
    shares = max(1, -(-documents // most))
    # Of a small corpus a task takes several rows, as starting one costs more than its work.
    size = max(1, SMALL_TASK_DOCUMENTS // max(1, documents))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [{"rows": group, "share": share, "shares": shares} for group in groups for share in range(shares)]


def find_duplicates(
    job: dict[str, Any], directory: Path, parts: list[str], counts: list[int], section: DeduplicationSection
) -> dict[str, Any]:
    """One task: writes int64 [3, n] of (dropped document, the one it repeats, similarity in millionths), sorted.

    Returns:
        the file's name, how many pairs were compared, and the first duplicates.
    """
    keys = Keys([directory / part for part in parts], counts)
    parts_found, compared = [], 0
    for row in job["rows"]:
        values, documents = keys.row(row, job["share"], job["shares"])
        order = np.argsort(values, kind="stable")
        values, documents = values[order], documents[order]
        found, count = _exact(values, documents) if row == 0 else _near(keys, row, values, documents, section)
        parts_found.append(found)
        compared += count
    found = np.concatenate(parts_found, axis=1)
    name = f"{FOLDER}/{job['rows'][0]:04d}-{job['share']:04d}.npy"
    (directory / FOLDER).mkdir(exist_ok=True)
    save(directory / name, found[:, np.argsort(found[0], kind="stable")])
    return {"file": name, "compared": compared, "found": found.shape[1]}


def _groups(values: np.ndarray) -> np.ndarray:
    """For each of the sorted ``values`` the place of the first one that is equal."""
    first = np.concatenate([[True], values[1:] != values[:-1]]) if len(values) else np.empty(0, dtype=bool)
    return np.maximum.accumulate(np.where(first, np.arange(len(values)), 0))


def _exact(values: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, int]:
    heads = _groups(values)
    later = np.flatnonzero(heads != np.arange(len(values)))
    originals = documents[heads[later]]
    return np.stack([documents[later], originals, np.full(len(later), 1_000_000)]).astype(np.int64), len(later)


def _near(
    keys: Keys, row: int, values: np.ndarray, documents: np.ndarray, section: DeduplicationSection
) -> tuple[np.ndarray, int]:
    heads = _groups(values)
    sizes = np.bincount(heads, minlength=len(values))[heads] if len(values) else heads
    several = np.flatnonzero(sizes > 1)
    values, documents = values[several], documents[several]
    if section.exact:
        # Of documents with the same text only the first can be kept, so only it is compared.
        texts = keys.columns(documents, slice(0, 1))[0] if len(documents) else documents
        order = np.lexsort([documents, texts, values])
        values, documents, texts = values[order], documents[order], texts[order]
        again = np.zeros(len(values), dtype=bool)
        again[1:] = (values[1:] == values[:-1]) & (texts[1:] == texts[:-1])
        values, documents = values[~again], documents[~again]
        order = np.lexsort([documents, values])
        values, documents = values[order], documents[order]
    heads = _groups(values)
    places = np.arange(len(values))
    pairs = []
    for distance in range(1, MOST_COMPARISONS + 1):
        # The nearest earlier ones, and the group's first.
        later = np.flatnonzero(places - distance >= heads)
        pairs.append(np.stack([later, later - distance]))
    later = np.flatnonzero(places - MOST_COMPARISONS > heads)
    pairs.append(np.stack([later, heads[later]]))
    later, earlier = documents[np.concatenate(pairs, axis=1)]
    if row > 1 and len(later):
        # Pairs that share an earlier band were compared there.
        bands = slice(1, row)
        fresh = ~(keys.columns(later, bands) == keys.columns(earlier, bands)).any(axis=0)
        later, earlier = later[fresh], earlier[fresh]
    similarities = keys.similarities(later, earlier)
    near = similarities >= section.threshold
    found = np.stack([later[near], earlier[near], np.round(similarities[near] * 1e6)]).astype(np.int64)
    return found, len(later)


def dropped_documents(directory: Path, files: Sequence[str], first: int, last: int) -> np.ndarray:
    """Which of the documents ``first`` to ``last`` are duplicates, sorted, each once."""
    found = [np.empty(0, dtype=np.int64)]
    for name in files:
        path = directory / name
        rows = np.load(path, mmap_mode="r" if path.stat().st_size > 256 else None)
        begin, end = np.searchsorted(rows[0], [first, last])
        found.append(np.asarray(rows[0, begin:end]))
    return np.unique(np.concatenate(found))
