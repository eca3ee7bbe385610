"""Precision and recall of near-duplicate detection, by threshold, on real documents with planted edits.

    python tests/benchmarks/near_duplicates.py [--documents 2000] [--text FILE] [--output FILE.json]

Copies of real documents are edited (words replaced, removed, inserted, halves swapped) at rates from one word in 500
to one in 6 and put among the originals. What is truly near is counted without hashes or signatures: a document is to be
dropped where an earlier one shares so many of its 5-word shingles, as tuples of words, that their Jaccard similarity
reaches the threshold. ``raylm``'s own tasks find theirs from MinHash bands.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from edited_corpus import base_documents

from raylm.config.cleaning import DeduplicationSection
from raylm.data.cleaning.duplicates import dropped_documents, duplicate_jobs, find_duplicates
from raylm.data.cleaning.signatures import Signatures
from raylm.data.sources.documents import Document
from raylm.data.words import normalized, words_of

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
RATES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.16)


def edited(text: str, rate: float, vocabulary: list[str], draw: random.Random) -> str:
    """``text`` with about ``rate`` of its words edited, at least one."""
    words = text.split()
    for _ in range(max(1, round(rate * len(words)))):
        place = draw.randrange(len(words))
        kind = draw.choice(["replace", "remove", "insert"])
        if kind == "replace":
            words[place] = draw.choice(vocabulary)
        elif kind == "insert":
            words.insert(place, draw.choice(vocabulary))
        elif len(words) > 20:
            del words[place]
    if draw.random() < 0.2:
        cut = draw.randrange(1, len(words))
        words = words[cut:] + words[:cut]
    return " ".join(words)


def nearest_earlier(texts: list[str], shingle_words: int) -> list[float]:
    """For each document the largest Jaccard similarity to an earlier one, counted exactly."""
    posting: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes, nearest = [], []
    for number, text in enumerate(texts):
        words = words_of(normalized(text))
        shingles = {
            tuple(words[start : start + shingle_words]) for start in range(max(1, len(words) - shingle_words + 1))
        }
        shared = Counter(other for shingle in shingles for other in posting[shingle])
        sizes.append(len(shingles))
        nearest.append(
            max((count / (len(shingles) + sizes[other] - count) for other, count in shared.items()), default=0)
        )
        for shingle in shingles:
            posting[shingle].append(number)
    return nearest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    base = [text for text in base_documents(arguments.text) if len(text.split()) >= 30]
    originals = draw.sample(base, min(arguments.documents, len(base)))
    vocabulary = [word for text in originals for word in text.split()]
    texts = originals + [edited(text, draw.choice(RATES), vocabulary, draw) for text in originals]
    draw.shuffle(texts)
    true = nearest_earlier(texts, 5)
    results = []
    for threshold in THRESHOLDS:
        section = DeduplicationSection(threshold=threshold)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            parts = [texts[start : start + 500] for start in range(0, len(texts), 500)]
            for number, part in enumerate(parts):
                signatures = Signatures(section)
                signatures.add([Document(text=text) for text in part])
                signatures.write(root / f"p{number}")
            names, counts = [f"p{number}" for number in range(len(parts))], [len(part) for part in parts]
            jobs = duplicate_jobs(section, len(texts))
            found = [find_duplicates(job, root, names, counts, section) for job in jobs]
            dropped = set(dropped_documents(root, [each["file"] for each in found], 0, len(texts)).tolist())
        wanted = {number for number, similarity in enumerate(true) if similarity >= threshold}
        hits = len(dropped & wanted)
        results.append(
            {
                "threshold": threshold,
                "bands": section.layout[0],
                "rows": section.layout[1],
                "near": len(wanted),
                "dropped": len(dropped),
                "precision": round(hits / max(1, len(dropped)), 4),
                "recall": round(hits / max(1, len(wanted)), 4),
                "compared": sum(each["compared"] for each in found),
                "seconds": round(time.perf_counter() - began, 2),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    histogram = Counter(min(9, int(similarity * 10)) for similarity in true)
    print(json.dumps({"documents": len(texts), "nearest, by tenths": dict(sorted(histogram.items()))}))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
