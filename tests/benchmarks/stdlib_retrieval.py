"""How often "What does X do?" finds the passage about X, for functions of the standard library.

    python tests/benchmarks/stdlib_retrieval.py [--functions 500] [--seed 0]

Prepares the ``stdlib-docs`` corpus, opens it as ``/v1/qa`` does, and asks for functions and methods drawn from
all public names that it documents, aliases such as ``os.path.join`` among them. The right passage is the first one of
the document about X. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from pathlib import Path

from raylm.config.data import DataSection
from raylm.data.samples.passages import passage_spans
from raylm.data.sources.corpus import Corpus
from raylm.data.sources.documents import Document, DocumentFile
from raylm.serving.retrieval.prepared import open_prepared
from raylm.serving.retrieval.store import StoredCollection


def public_functions(documents: list[Document]) -> list[tuple[str, Document]]:
    """(name, document) of every public function and method, by its title and its aliases."""
    found = []
    for document in documents:
        heading = document.text.split("\n\n", 1)[0]
        if heading.startswith(("module ", "class ", "topic ")):
            continue
        for name in (document.title, *document.aliases.split()):
            if not any(part.startswith("_") for part in name.split(".")):
                found.append((name, document))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--functions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    documents = [document for _, document in Corpus(DataSection(train="stdlib-docs")).documents()]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "documents"
        folder.mkdir()
        with DocumentFile(folder / "train-00000.parquet", "documents") as writer:
            for document in documents:
                writer.write(document)
        began = time.perf_counter()
        collection = open_prepared(directory, Path(directory) / "index")
        opened = time.perf_counter() - began
        measure(arguments, documents, collection, opened)


def measure(
    arguments: argparse.Namespace, documents: list[Document], collection: StoredCollection, opened: float
) -> None:
    """Ask, and print what was found."""
    asked = random.Random(arguments.seed).sample(public_functions(documents), arguments.functions)
    places, seconds, misses = [], [], []
    for name, document in asked:
        began = time.perf_counter()
        matches = collection.search(f"What does {name} do?", 3)
        seconds.append(time.perf_counter() - began)
        right = (document.id, document.text[slice(*next(passage_spans(document.text)))])
        found = [(match.passage.id, match.passage.text) for match in matches]
        places.append(found.index(right) if right in found else None)
        if right not in found:
            misses.append({"name": name, "documented": document.title, "found": [m.passage.title for m in matches]})
    print(
        json.dumps(
            {
                "python": platform.python_version(),
                "documents": len(documents),
                "passages": collection.facts().passages,
                "functions": len(asked),
                "top_1": sum(place == 0 for place in places) / len(asked),
                "top_3": sum(place is not None for place in places) / len(asked),
                "open_seconds": round(opened, 2),
                "search_milliseconds_median": round(1000 * sorted(seconds)[len(seconds) // 2], 2),
                "misses": misses,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
