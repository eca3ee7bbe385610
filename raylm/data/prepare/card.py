"""What a data card says of a finished set beyond what the passes count: lengths, languages, duplicates, examples.

Each function measures files that are there already and gives JSON for ``report.json``. Languages are found on a sample,
so that this takes about a second whatever the size of the set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raylm.data.sources.documents import document_files

SAMPLED_DOCUMENTS = 500
LANGUAGE_CHARACTERS = 500
EXAMPLES, EXAMPLE_CHARACTERS = 4, 400
SIMILARITY_BINS = 20
# Lengths in tokens by half powers of two.
LENGTH_EDGES = sorted({0, *(round(2 ** (half / 2)) for half in range(64))})


def describe_set(directory: Path, splits: dict[str, Any]) -> dict[str, Any]:
    """Tokens a document, languages, and the beginnings of some training documents.

    Args:
        directory: a set whose files are written.
        splits: as in its manifest.
    """
    texts = _sample(directory)
    return {
        "tokens_per_document": _lengths(directory, splits),
        "languages": _languages(texts),
        "examples": [text[:EXAMPLE_CHARACTERS] for text in texts[:: max(1, len(texts) // EXAMPLES)][:EXAMPLES]],
    }


def _lengths(directory: Path, splits: dict[str, Any]) -> dict[str, Any]:
    parts = []
    for split in splits.values():
        for entry in split["files"]:
            starts = np.load(directory / entry["index"]["path"], mmap_mode="r")[:, 0]
            parts.append(np.diff(starts, append=entry["tokens"]).astype(np.int64))
    lengths = np.concatenate(parts)
    counts = np.histogram(lengths, [*LENGTH_EDGES, np.iinfo(np.int64).max])[0]
    first, last = np.flatnonzero(counts)[[0, -1]]
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95], method="nearest").tolist()
    return {
        "from": LENGTH_EDGES[first : last + 1],
        "documents": counts[first : last + 1].tolist(),
        "mean": round(float(lengths.mean()), 2),
        **dict(zip(("percentile_5", "median", "percentile_95"), quantiles, strict=True)),
        "longest": int(lengths.max()),
    }


def _sample(directory: Path) -> list[str]:
    """Texts from the beginning of each file of training documents, as many from each."""
    files = document_files(directory, "train")
    # At most so many files are opened, evenly chosen.
    files = files[:: max(1, len(files) // SAMPLED_DOCUMENTS)]
    texts: list[str] = []
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(-(-SAMPLED_DOCUMENTS // len(files)), row_groups=[0], columns=["text"]):
                texts += batch.column(0).to_pylist()
                break
    return texts


def _languages(texts: list[str]) -> dict[str, Any]:
    import py3langid

    found = Counter(py3langid.classify(text[:LANGUAGE_CHARACTERS])[0] for text in texts)
    return {"sampled": len(texts), "documents": dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))}


def describe_duplicates(work: Path, files: Sequence[str], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """How many documents repeat another one exactly and nearly, how similar they are, and some of them.

    Args:
        work: the work directory.
        files: those that :func:`raylm.data.cleaning.duplicates.find_duplicates` wrote.
        parts: all parts in order.
    """
    found = np.concatenate([np.empty((3, 0), dtype=np.int64), *(np.load(work / name) for name in files)], axis=1)
    # Of each dropped document, the one that it is most similar to.
    found = found[:, np.lexsort([found[1], -found[2], found[0]])]
    found = found[:, np.unique(found[0], return_index=True)[1]]
    similarities = found[2] / 1e6
    near = np.flatnonzero(found[2] < 1_000_000)
    counts = np.histogram(similarities[near], SIMILARITY_BINS, (0.0, 1.0))[0].tolist()
    first = next((place for place, count in enumerate(counts) if count), SIMILARITY_BINS)
    chosen = [*near[:: max(1, len(near) // EXAMPLES)][:EXAMPLES], *np.flatnonzero(found[2] == 1_000_000)[:1]]
    examples = [
        {
            "similarity": round(float(similarities[place]), 4),
            "dropped": _text_of(work, parts, int(found[0, place])),
            "kept": _text_of(work, parts, int(found[1, place])),
        }
        for place in chosen
    ]
    return {
        "same": int(found.shape[1] - len(near)),
        "near": len(near),
        "near_by_similarity": {f"{n / SIMILARITY_BINS:.2f}": counts[n] for n in range(first, SIMILARITY_BINS)},
        "examples": examples,
    }


def _text_of(work: Path, parts: list[dict[str, Any]], document: int) -> str:
    """The beginning of a document, by its number over all parts."""
    part = next(part for part in parts if part["first"] <= document < part["first"] + part["documents"])
    row = document - part["first"]
    with pq.ParquetFile(work / "parts" / f"{part['name']}.parquet") as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                return file.read_row_group(group, columns=["text"]).column(0)[row].as_py()[:EXAMPLE_CHARACTERS]
            row -= rows
    raise IndexError(f"document {document} of part {part['name']}")
