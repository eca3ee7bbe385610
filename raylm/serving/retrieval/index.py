"""An index of passages: BM25 (Robertson and Zaragoza 2009) over text and title, and vectors of an encoder, in one rank.

In: words and vectors of passages. Out: a directory of arrays that many processes map into memory, and ranked passages.
An index is never changed, only replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np

from raylm.serving.retrieval.text import content_words, tokenize

# How much a match in the title counts against one in the text.
TITLE_WEIGHT = 2.0
# Share of the vectors in the rank, beside that of the words.
DENSE_WEIGHT = 0.5
# Word of every title: bm25s cannot index texts that have none at all. No question has it.
_EVERYWHERE = "\0"


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        passage: its number.
        score: what it was ranked by, higher is better; comparable within one search only.
        relevance: from 0 to 1, whether it has anything to do with the question; comparable between searches.
    """

    passage: int
    score: float
    relevance: float


class Index:
    """Passages that can be searched.

    Args:
        text, title: BM25 of the passages' texts and titles.
        passages: int64 [passages]; their numbers.
        documents: int64 [passages]; the numbers of their documents.
        vectors: fp32 [passages, width], each of length 1; None without an encoder.
    """

    def __init__(
        self,
        text: bm25s.BM25,
        title: bm25s.BM25,
        passages: np.ndarray,
        documents: np.ndarray,
        vectors: np.ndarray | None,
    ) -> None:
        self._text, self._title, self._passages, self._documents = text, title, passages, documents
        self.vectors = vectors

    @classmethod
    def build(cls, rows: Iterable[tuple[int, int, str, str]], vectors: np.ndarray | None) -> Index:
        """Index passages.

        Args:
            rows: (passage number, document number, title, text) of each; at least one.
            vectors: as in the class.
        """
        passages, documents, texts, titles = [], [], [], []
        for passage, document, title, text in rows:
            passages.append(passage)
            documents.append(document)
            texts.append(tokenize(text) or [_EVERYWHERE])
            titles.append([*tokenize(title), _EVERYWHERE])
        return cls(_bm25(texts), _bm25(titles), np.array(passages), np.array(documents), vectors)

    def save(self, directory: Path) -> None:
        """Write everything into a new ``directory``."""
        directory.mkdir()
        self._text.save(directory / "text", show_progress=False)
        self._title.save(directory / "title", show_progress=False)
        np.save(directory / "passages.npy", self._passages)
        np.save(directory / "documents.npy", self._documents)
        if self.vectors is not None:
            np.save(directory / "vectors.npy", self.vectors)

    @classmethod
    def load(cls, directory: Path) -> Index:
        """Map a saved index into memory."""
        vectors = directory / "vectors.npy"
        return cls(
            bm25s.BM25.load(directory / "text", mmap=True, show_progress=False),
            bm25s.BM25.load(directory / "title", mmap=True, show_progress=False),
            np.load(directory / "passages.npy"),
            np.load(directory / "documents.npy"),
            np.load(vectors, mmap_mode="r") if vectors.exists() else None,
        )

    def __len__(self) -> int:
        return len(self._passages)

    def search(
        self, question: str, count: int, vector: np.ndarray | None = None, dense_weight: float = DENSE_WEIGHT
    ) -> list[Hit]:
        """The best passages of the ``count`` best documents for ``question``, best first.

        One passage a document: further ones of the same would leave no room for others. Scores of words and of
        vectors, each divided by the best one of the search, are added by weight.

        Args:
            vector: of the question, fp32 [width], length 1; without it, or without vectors here, words alone decide,
                and only passages that share one with the question are found.
            dense_weight: share of the vectors.
        """
        words = tokenize(question)
        scores = _scores(self._text, words) + TITLE_WEIGHT * _scores(self._title, words)
        cosines = None
        least = 0.0
        if vector is not None and self.vectors is not None:
            cosines = self.vectors @ vector
            scores = (1 - dense_weight) * _scaled(scores) + dense_weight * _scaled(cosines)
            least = -np.inf
        places: dict[int, int] = {}
        # Stable: of equal passages the earlier one in its document comes first.
        for place in np.argsort(-scores, kind="stable"):
            if scores[place] <= least or len(places) == count:
                break
            places.setdefault(int(self._documents[place]), int(place))
        found = np.array(list(places.values()), dtype=np.int64)
        relevance = self._coverage(content_words(words), found)
        if cosines is not None:
            relevance = (relevance + np.clip(cosines[found], 0, 1)) / 2
        return [
            Hit(int(self._passages[place]), float(scores[place]), float(value))
            for place, value in zip(found, relevance, strict=True)
        ]

    def _coverage(self, words: list[str], places: np.ndarray) -> np.ndarray:
        """Share of the question's words, by their information, that each of ``places`` has in its text or title."""
        covered, total = np.zeros(len(places)), 0.0
        for word in words:
            holders = np.union1d(_holders(self._text, word), _holders(self._title, word))
            # The information that BM25 gives to a word which so many passages have.
            information = np.log1p((len(self) - len(holders) + 0.5) / (len(holders) + 0.5))
            covered += information * np.isin(places, holders)
            total += information
        return covered / total if total else covered


def _bm25(texts: list[list[str]]) -> bm25s.BM25:
    index = bm25s.BM25(backend="numpy")
    index.index(texts, show_progress=False)
    return index


def _scores(index: bm25s.BM25, words: list[str]) -> np.ndarray:
    ids = index.get_tokens_ids(words)
    return index.get_scores_from_ids(ids) if ids else np.zeros(index.scores["num_docs"], dtype=np.float32)


def _holders(index: bm25s.BM25, word: str) -> np.ndarray:
    """Places of the passages that have ``word``."""
    ids = index.get_tokens_ids([word])
    if not ids:
        return np.zeros(0, dtype=np.int64)
    starts = index.scores["indptr"]
    return index.scores["indices"][starts[ids[0]] : starts[ids[0] + 1]].astype(np.int64)


def _scaled(scores: np.ndarray) -> np.ndarray:
    """``scores`` with 1 as the best."""
    best = scores.max()
    return scores / best if best > 0 else np.zeros_like(scores)
