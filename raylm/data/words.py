"""Words of a text for counting and comparing, in any language: runs of letters and digits, and single characters of
Chinese and Japanese."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import xxhash

# CJK ideographs with extension A and compatibility forms, hiragana and katakana.
CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
_CJK = re.compile(rf"[{CJK}]")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Bounds what a table takes in memory.
MOST_WORDS = 1 << 17


def words_of(text: str) -> list[str]:
    """The words of ``text``, as they stand."""
    return _WORD.findall(text)


def has_cjk(text: str) -> bool:
    """Whether a Chinese or Japanese character is in ``text``."""
    return _CJK.search(text) is not None


def compatible(text: str) -> str:
    """The text in Unicode's compatibility form, NFKC; itself where it is in this form already."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def normalized(text: str) -> str:
    """What two texts that are the same to a reader have in common: NFKC, case folded, white space single."""
    return " ".join(compatible(text).casefold().split())


class WordTable(dict[str, int]):
    """Numbers words as they come, and knows of each its length and a hash of what it is apart from letter case.

    Most of a text's words came before, so that little is computed for any of them. A number stands for its word until
    :meth:`trim` is called; a hash does for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fresh: list[str] = []
        self._hashes, self._lengths = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self._fresh.append(word)
        return number

    def numbers(self, words: Sequence[str]) -> np.ndarray:
        """int64 [words]."""
        return np.fromiter(map(self.__getitem__, words), dtype=np.int64, count=len(words))

    def trim(self) -> None:
        """Forget all words if they are many."""
        if len(self) > MOST_WORDS:
            self.clear()
            self._learn()
            self._hashes, self._lengths = self._hashes[:0], self._lengths[:0]

    def _learn(self) -> None:
        if self._fresh:
            hashes = [xxhash.xxh3_64_intdigest(word.casefold().encode()) for word in self._fresh]
            self._hashes = np.concatenate([self._hashes, np.array(hashes, dtype=np.uint64)])
            self._lengths = np.concatenate([self._lengths, np.array([len(word) for word in self._fresh])])
            self._fresh = []

    def hashes(self, numbers: np.ndarray) -> np.ndarray:
        """uint64 of the shape of ``numbers``, the same for words that differ in letter case only."""
        self._learn()
        return self._hashes[numbers]

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Characters of each word, int64 of the shape of ``numbers``."""
        self._learn()
        return self._lengths[numbers]


def rolling(hashes: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of ``length`` words: uint64 [n] to uint64 [n - length + 1], empty where n is smaller."""
    return runs(hashes, np.arange(max(0, len(hashes) - length + 1)), length)


def runs(hashes: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the runs of ``length`` words that begin at ``starts``: uint64 of the shape of ``starts``."""
    combined = hashes[starts]
    for place in range(1, length):
        combined = combined * MULTIPLIER + hashes[starts + place]
    # The last step of a good hash: without it, the low bits of a sum of products are weak.
    combined ^= combined >> np.uint64(32)
    return combined * MULTIPLIER
