"""How often a question of a SQuAD-format file finds its own paragraph among all: by words, by vectors, and by both.

    python tests/benchmarks/hybrid_retrieval.py SQUAD.json ENCODER_DIRECTORY OUT.json [--questions 0] [--threads 2]

Every paragraph is a document without a title in a collection on disk, as clients upload them, and is searched as
``/v1/collections/NAME/search`` does. ``--questions`` takes that many, drawn with a fixed seed; 0 takes all.
Prints a table, and the rank under other weights of the vectors; writes everything as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from raylm.config.serving import ServingSection
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.encoder import open_encoder
from raylm.serving.retrieval.library import Library
from raylm.serving.retrieval.records import StoredDocument
from raylm.serving.retrieval.shelf import Shelf

WEIGHTS = {"BM25 alone": 0.0, "dense alone": 1.0, "hybrid": 0.5}
OTHER_WEIGHTS = (0.2, 0.3, 0.4, 0.6, 0.7)
MOST_DOCUMENTS = 10


def read(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Paragraphs, and (question, id of its paragraph)."""
    paragraphs: dict[str, str] = {}
    asked = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            name = paragraphs.setdefault(paragraph["context"], str(len(paragraphs)))
            asked += [(question["question"], name) for question in paragraph["qas"]]
    return list(paragraphs), asked


async def measure(arguments: argparse.Namespace, directory: Path) -> dict:
    paragraphs, asked = read(arguments.file)
    if arguments.questions:
        asked = random.Random(0).sample(asked, arguments.questions)
    encoder = open_encoder(arguments.encoder, ServingSection(), arguments.threads)
    library = Library(CollectionStore(directory), encoder=encoder)
    await Shelf(library).create("paragraphs")
    began = time.perf_counter()
    await Shelf(library).add("paragraphs", [StoredDocument(str(n), "", text) for n, text in enumerate(paragraphs)])
    indexed = time.perf_counter() - began
    collection = library.store.get("paragraphs")
    began = time.perf_counter()
    vectors = await encoder.vectors([question for question, _ in asked])
    encoded = time.perf_counter() - began
    rows = {}
    for name, weight in [*WEIGHTS.items(), *((f"hybrid, {weight} dense", weight) for weight in OTHER_WEIGHTS)]:
        began = time.perf_counter()
        places = []
        for (question, right), vector in zip(asked, vectors, strict=True):
            matches = collection.search(question, MOST_DOCUMENTS, vector if weight else None, dense_weight=weight)
            found = [match.passage.id for match in matches]
            places.append(found.index(right) if right in found else MOST_DOCUMENTS)
        seconds = time.perf_counter() - began
        rows[name] = {f"top_{k}": float(np.mean(np.array(places) < k)) for k in (1, 3, 5, 10)}
        rows[name]["search_milliseconds"] = 1000 * seconds / len(asked)
    encoder.engine.close()
    return {
        "file": arguments.file.name,
        "paragraphs": len(paragraphs),
        "passages": collection.facts().passages,
        "questions": len(asked),
        "index_seconds": indexed,
        "encode_question_milliseconds": 1000 * encoded / len(asked),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("encoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = asyncio.run(measure(arguments, Path(directory)))
    arguments.output.write_text(json.dumps(report, indent=1))
    print(f"{report['questions']} questions, {report['paragraphs']} paragraphs, {report['passages']} passages")
    for name, row in report["rows"].items():
        print(f"| {name:<20} | " + " | ".join(f"{100 * row[f'top_{k}']:.1f}%" for k in (1, 3, 5)) + " |")


if __name__ == "__main__":
    main()
