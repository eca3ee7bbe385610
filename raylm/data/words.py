"""Words of a text for counting and comparing, in any language: runs of letters and digits, and single characters of
Chinese and Japanese."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

# CJK ideographs with extension A and compatibility forms, hiragana and katakana.
CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
_CJK = re.compile(rf"[{CJK}]")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """The words of ``text``, as they stand."""
    return _WORD.findall(text)


def has_cjk(text: str) -> bool:
    """Whether a Chinese or Japanese character is in ``text``."""
    return _CJK.search(text) is not None


def normalized(text: str) -> str:
    """What two texts that are the same to a reader have in common: NFKC, case folded, white space single."""
    folded = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def rolling(hashes: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of ``length`` words: uint64 [n] to uint64 [n - length + 1], empty where n is smaller."""
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    combined = hashes[:count].copy()
    for place in range(1, length):
        combined = combined * _MULTIPLIER + hashes[place : place + count]
    # The last step of a good hash: without it, the low bits of a sum of products are weak.
    combined ^= combined >> np.uint64(32)
    return combined * _MULTIPLIER
