"""How often a question finds its own paragraph among all of a SQuAD-format file, by words, by meaning, and by both.

    python tests/benchmarks/passage_retrieval.py QUESTIONS.json --encoder DIRECTORY [--output RESULT.json]

Every paragraph becomes a document with its article's title, in a collection on disk as ``/v1/collections`` keeps it; a
paragraph counts as found where any passage of it is in the first 1 or 3. ``--encoder`` is the directory of a sentence
encoder such as MiniLM, read by transformers in fp32 with mean pooling; without it only words are measured. Also given
are reciprocal rank fusion (Cormack et al. 2009, k = 60) of the two rankings, and how many questions the best passage's
relevance would refuse at some thresholds beside those that are asked of a file in which nothing answers them
(``--foreign OTHER.json``). Prints one JSON object, and a table on stderr.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from raylm.serving.retrieval.index import DENSE_WEIGHT
from raylm.serving.retrieval.store import StoredCollection, StoredDocument

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
FUSION_CONSTANT, FUSION_DEPTH = 60, 50
BATCH = 16


def read_questions(path: Path) -> tuple[list[StoredDocument], list[tuple[str, str]]]:
    """Paragraphs, and (question, id of its paragraph)."""
    documents, questions = [], []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            number = f"paragraph-{len(documents)}"
            title = article.get("title", "").replace("_", " ")
            documents.append(StoredDocument(number, title, paragraph["context"]))
            questions += [(question["question"], number) for question in paragraph["qas"]]
    return documents, questions


class MeanEncoder:
    """A sentence encoder with mean pooling: texts to vectors of length 1."""

    def __init__(self, directory: str, longest: int = 256) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModel.from_pretrained(directory).eval()
        self._longest = longest
        self.encode = functools.lru_cache(maxsize=4)(self._encode)

    def _encode(self, texts: tuple[str, ...]) -> np.ndarray:
        """Vectors, fp32 [texts, width]."""
        import torch

        found = []
        for start in range(0, len(texts), BATCH):
            batch = self._tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy())
        return np.concatenate(found)


def make_collection(directory: Path, documents: list[StoredDocument], encoder: MeanEncoder | None) -> StoredCollection:
    """The documents in a collection on disk, indexed."""
    collection = StoredCollection.create(directory)
    collection.add(documents)
    if encoder is not None:
        while waiting := collection.to_embed("benchmark", 1000):
            vectors = encoder.encode(tuple(text for _, text in waiting))
            collection.keep_vectors("benchmark", list(zip([number for number, _ in waiting], vectors, strict=True)))
    collection.build()
    return collection


def shares(found: list[list[str]], right: list[str]) -> dict[str, float]:
    """Share of the questions whose paragraph comes first, and in the first three."""
    return {
        f"top_{most}": round(float(np.mean([id_ in ids[:most] for ids, id_ in zip(found, right, strict=True)])), 4)
        for most in (1, 3)
    }


def fused(first: list[str], second: list[str]) -> list[str]:
    """Two rankings by reciprocal rank fusion, the best three."""
    scores: dict[str, float] = {}
    for ranking in (first, second):
        for rank, id_ in enumerate(ranking, 1):
            scores[id_] = scores.get(id_, 0.0) + 1 / (FUSION_CONSTANT + rank)
    return sorted(scores, key=lambda id_: -scores[id_])[:3]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("questions", type=Path)
    parser.add_argument("--encoder")
    parser.add_argument("--foreign", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    documents, questions = read_questions(arguments.questions)
    asked, right = [question for question, _ in questions], [id_ for _, id_ in questions]
    encoder = MeanEncoder(arguments.encoder) if arguments.encoder else None
    with tempfile.TemporaryDirectory() as directory:
        collection = make_collection(Path(directory) / "paragraphs", documents, encoder)

        def search(texts: list[str], count: int, weight: float) -> tuple[list[list[str]], list[float], list[float]]:
            """Ids of what is found, relevance of the best, and milliseconds without the encoder's, a question each."""
            vectors = encoder.encode(tuple(texts)) if encoder is not None and weight > 0 else [None] * len(texts)
            ids, relevance, milliseconds = [], [], []
            for text, vector in zip(texts, vectors, strict=True):
                began = time.perf_counter()
                matches = collection.search(text, count, vector, dense_weight=weight)
                milliseconds.append(1e3 * (time.perf_counter() - began))
                ids.append([match.passage.id for match in matches])
                relevance.append(matches[0].relevance if matches else 0.0)
            return ids, relevance, milliseconds

        words, relevance, milliseconds = search(asked, FUSION_DEPTH, 0.0)
        table = {"bm25": shares(words, right)}
        if encoder is not None:
            dense = search(asked, FUSION_DEPTH, 1.0)[0]
            hybrid, relevance, milliseconds = search(asked, 3, DENSE_WEIGHT)
            table["dense"] = shares(dense, right)
            table["hybrid"] = shares(hybrid, right)
            table["reciprocal_rank_fusion"] = shares([fused(*pair) for pair in zip(words, dense, strict=True)], right)
        refused = {"own": relevance}
        if arguments.foreign:
            foreign = [question for question, _ in read_questions(arguments.foreign)[1]]
            refused["foreign"] = search(foreign, 1, DENSE_WEIGHT)[1]
        result = {
            "file": arguments.questions.name,
            "paragraphs": len(documents),
            "passages": collection.facts().passages,
            "questions": len(asked),
            "rankings": table,
            "search_milliseconds_median": round(float(np.median(milliseconds)), 2),
            "refused": {
                whose: {str(least): round(float(np.mean(np.array(values) < least)), 4) for least in THRESHOLDS}
                for whose, values in refused.items()
            },
        }
    for name, row in table.items():
        print(f"{name:24}{row['top_1']:8.2%}{row['top_3']:8.2%}", file=sys.stderr)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
