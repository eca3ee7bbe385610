"""A corpus of any size for benchmarks: real documents with real edits, so that it neither compresses to nothing nor is
all duplicates.

Each document is one of the embedded corpus (or a paragraph of a file) some of whose words were replaced by words of
others; every tenth repeats an earlier one, half of these word for word.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import numpy as np

DUPLICATE_SHARE = 0.1


def base_documents(text: Path | None = None) -> list[str]:
    """Documents to edit: paragraphs of ``text``, or the embedded ones, of 200 characters or more."""
    if text is not None:
        found = text.read_text(encoding="utf-8").split("\n\n")
        joined = ["\n\n".join(found[start : start + 8]) for start in range(0, len(found), 8)]
        return [document for document in joined if len(document) >= 200]
    from raylm.data.sources.stdlib import stdlib_documents

    return [document.text for document in stdlib_documents() if len(document.text) >= 200]


class Editor:
    """Edits documents: some of their words become words of others, the layout stays.

    Args:
        documents: what is edited, and where the words come from.
        draw: chooses.
    """

    def __init__(self, documents: list[str], draw: np.random.Generator) -> None:
        self._draw = draw
        pieces = [document.split(" ") for document in documents]
        self._sizes = np.array([len(each) for each in pieces])
        self._pieces = np.array([piece for each in pieces for piece in each], dtype=object)
        self._words = self._pieces[self._pieces != ""]

    def all(self, least: float, most: float) -> list[str]:
        """Every document once, in any order, with a share of words between ``least`` and ``most`` replaced."""
        shares = np.repeat(self._draw.uniform(least, most, len(self._sizes)), self._sizes)
        pieces = self._replaced(self._pieces, self._draw.random(len(self._pieces)) < shares)
        ends = np.cumsum(self._sizes)
        found = [" ".join(pieces[end - size : end]) for size, end in zip(self._sizes, ends, strict=True)]
        return [found[place] for place in self._draw.permutation(len(found))]

    def slightly(self, text: str) -> str:
        """``text`` with one word in a hundred replaced, one at least."""
        pieces = np.array(text.split(" "), dtype=object)
        chosen = self._draw.random(len(pieces)) < 0.01
        chosen[self._draw.integers(len(pieces))] = True
        return " ".join(self._replaced(pieces, chosen))

    def _replaced(self, pieces: np.ndarray, chosen: np.ndarray) -> list[str]:
        pieces = pieces.copy()
        pieces[chosen] = self._words[self._draw.integers(len(self._words), size=np.count_nonzero(chosen))]
        return pieces.tolist()


def write_corpus(path: Path, size: int, seed: int = 0, text: Path | None = None) -> int:
    """Write about ``size`` bytes as JSONL; returns the number of documents."""
    draw = np.random.default_rng(seed)
    editor = Editor(base_documents(text), draw)
    waiting: list[str] = []
    recent: deque[str] = deque(maxlen=2000)
    written = count = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            waiting = waiting or editor.all(0.2, 0.5)
            if recent and draw.random() < DUPLICATE_SHARE:
                document = recent[draw.integers(len(recent))]
                if draw.random() < 0.5:
                    document = editor.slightly(document)
            else:
                document = waiting.pop()
                recent.append(document)
            written += stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            count += 1
    return count
