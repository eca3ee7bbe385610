"""An index of passages: BM25 (Robertson and Zaragoza 2009) over text and title, and vectors of an encoder, in one rank.

A document that the question names comes before all others, and stop words find nothing.

In: words and vectors of passages. Out: a directory of arrays that many processes map into memory, and ranked passages.
An index is never changed, only replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np

from raylm.serving.retrieval.records import PassageRow
from raylm.serving.retrieval.text import content_words, keys_in, keys_of, tokenize

# How much a match in the title counts against one in the text.
TITLE_WEIGHT = 2.0
# How much a stop word counts in the text of a passage that has a content word of the question; in titles, nothing.
STOP_WORD_WEIGHT = 1 / 3
# Share of the vectors in the rank, beside that of the words.
DENSE_WEIGHT = 0.5
# Word of every title and name: bm25s cannot index texts that have none at all. No question has it.
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
        names: the keys of the documents' names, as words of their passages; None in an index of an earlier raylm.
        passages: int64 [passages]; their numbers.
        documents: int64 [passages]; the numbers of their documents.
        vectors: fp32 [passages, width], each of length 1; None without an encoder.
    """

    def __init__(
        self,
        text: bm25s.BM25,
        title: bm25s.BM25,
        names: bm25s.BM25 | None,
        passages: np.ndarray,
        documents: np.ndarray,
        vectors: np.ndarray | None,
    ) -> None:
        self._text, self._title, self._names = text, title, names
        self._passages, self._documents = passages, documents
        self.vectors = vectors

    @classmethod
    def build(cls, rows: Iterable[PassageRow]) -> Index:
        """Index passages by their words, and by their vectors where all have one.

        Args:
            rows: at least one, documents in order.
        """
        passages, documents, texts, titles, names, blobs = [], [], [], [], [], []
        for passage, document, title, aliases, text, vector in rows:
            blobs.append(vector)
            is_first = not documents or document != documents[-1]
            keys = {key for name in (title, *aliases.split()) for key in keys_of(name, is_first=is_first)}
            passages.append(passage)
            documents.append(document)
            texts.append(tokenize(text) or [_EVERYWHERE])
            titles.append([*tokenize(f"{title} {aliases}"), _EVERYWHERE])
            names.append([*sorted(keys), _EVERYWHERE])
        vectors = None
        if all(blob is not None for blob in blobs):
            vectors = np.stack([np.frombuffer(blob, "<f4") for blob in blobs if blob is not None])
        return cls(_bm25(texts), _bm25(titles), _bm25(names), np.array(passages), np.array(documents), vectors)

    def save(self, directory: Path) -> None:
        """Write everything into a new ``directory``."""
        directory.mkdir()
        self._text.save(directory / "text", show_progress=False)
        self._title.save(directory / "title", show_progress=False)
        if self._names is not None:
            self._names.save(directory / "names", show_progress=False)
        np.save(directory / "passages.npy", self._passages)
        np.save(directory / "documents.npy", self._documents)
        if self.vectors is not None:
            np.save(directory / "vectors.npy", self.vectors)

    @classmethod
    def load(cls, directory: Path) -> Index:
        """Map a saved index into memory."""
        vectors = directory / "vectors.npy"
        has_names = (directory / "names").is_dir()
        return cls(
            bm25s.BM25.load(directory / "text", mmap=True, show_progress=False),
            bm25s.BM25.load(directory / "title", mmap=True, show_progress=False),
            bm25s.BM25.load(directory / "names", mmap=True, show_progress=False) if has_names else None,
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
        words = content_words(tokenize(question))
        scores = self._text_scores(question) + TITLE_WEIGHT * _scores(self._title, words)
        named = self._named(question)
        # Before all others, among each other by their words.
        scores = scores + (scores.max() + 1) * named
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
        # A title that consists of stop words is found by its name alone.
        relevance = self._coverage(words, found) if words else (named[found] > 0).astype(np.float64)
        if cosines is not None:
            relevance = (relevance + np.clip(cosines[found], 0, 1)) / 2
        return [
            Hit(int(self._passages[place]), float(scores[place]), float(value))
            for place, value in zip(found, relevance, strict=True)
        ]

    def _text_scores(self, question: str) -> np.ndarray:
        """BM25 of the texts; stop words tell passages with a content word apart, and find none themselves."""
        words = tokenize(question)
        content = content_words(words)
        scores = _scores(self._text, content)
        known = set(content)
        rest = [word for word in words if word not in known]
        return scores + STOP_WORD_WEIGHT * (scores > 0) * _scores(self._text, rest)

    def _named(self, question: str) -> np.ndarray:
        """How many of the names in ``question`` each passage's document has, float64 [passages]."""
        counts = np.zeros(len(self))
        if self._names is not None:
            for key in keys_in(question):
                counts[_holders(self._names, key)] += 1
        return counts

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


def write_index(rows: Iterable[PassageRow], directory: Path) -> None:
    """Index passages in a new ``directory``, which :meth:`Index.load` opens."""
    Index.build(rows).save(directory)


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
