"""Filters of published corpora: each takes a text and says why it is to be dropped, or nothing.

Gopher: Rae et al. 2021, "Scaling Language Models", section A.1.1 and table A1 (arXiv 2112.11446). C4: Raffel et al.
2020, "Exploring the Limits of Transfer Learning", section 2.2 (arXiv 1910.10683); its list of bad words is left out.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from raylm.data.words import rolling

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "‣", "◦", "-", "*", "·")
ELLIPSES = ("...", "…")
# Table A1: the largest share of characters, by length of the n-gram.
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?:\s|$)")
_POLICY = re.compile(r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.I)


def gopher_quality(text: str, words: list[str]) -> str | None:
    """Why Gopher's quality rules drop the text, or None."""
    # Words as the paper counts them, between white space.
    tokens = text.split()
    count = len(tokens)
    if not 50 <= count <= 100_000:
        return "fewer than 50 words" if count < 50 else "more than 100,000 words"
    mean = sum(map(len, tokens)) / count
    if not 3 <= mean <= 10:
        return "mean length of words"
    if text.count("#") / count > 0.1 or (text.count("...") + text.count("…")) / count > 0.1:
        return "symbols"
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "ellipses"
    if sum(any(map(str.isalpha, token)) for token in tokens) < 0.8 * count:
        return "words without letters"
    if len(STOP_WORDS & {word.lower() for word in words}) < 2:
        return "stop words"
    return None


def gopher_repetition(text: str, words: list[str]) -> str | None:
    """Why Gopher's repetition rules drop the text, or None."""
    size = len(text)
    for unit, separator, most, most_characters in (
        ("lines", "\n", DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS),
        ("paragraphs", "\n\n", DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        parts = [part.strip() for part in text.split(separator)]
        parts = [part for part in parts if part]
        again = len(parts) - len(set(parts))
        if again:
            if again > most * len(parts):
                return f"repeated {unit}"
            counted = Counter(parts)
            if sum(len(part) * (times - 1) for part, times in counted.items()) > most_characters * size:
                return f"characters in repeated {unit}"
    if len(words) < 2:
        return None
    numbers: dict[str, int] = {}
    hashes = np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], dtype=np.uint64)
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    total = max(1, int(lengths.sum()))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for length, share in TOP_NGRAMS.items():
        grams = rolling(hashes, length)
        if not grams.size:
            return None
        _, first, counts = np.unique(grams, return_index=True, return_counts=True)
        best = int(counts.argmax())
        characters = int(ends[first[best] + length] - ends[first[best]])
        if counts[best] > 1 and counts[best] * characters > share * total:
            return f"most frequent {length}-gram"
    for length, share in DUPLICATE_NGRAMS.items():
        grams = rolling(hashes, length)
        _, first = np.unique(grams, return_index=True)
        if len(first) == len(grams):
            # No n-gram is there twice, so no longer one is.
            return None
        again = np.ones(len(grams), dtype=bool)
        again[first] = False
        starts = np.flatnonzero(again)
        covered = np.zeros(len(words) + 1, dtype=np.int64)
        np.add.at(covered, starts, 1)
        np.add.at(covered, starts + length, -1)
        if lengths[np.cumsum(covered[:-1]) > 0].sum() > share * total:
            return f"repeated {length}-grams"
    return None


def c4_lines(text: str) -> tuple[str, str | None]:
    """The lines that C4 keeps, and why it drops the whole text, or None."""
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        return text, "lorem ipsum"
    if "{" in text:
        return text, "curly bracket"
    kept = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped.endswith((".", "!", "?", '"', "”", "'", "’")) or stripped.endswith(ELLIPSES):
            continue
        if len(stripped.split()) < 5 or "javascript" in stripped.lower() or _POLICY.search(stripped):
            continue
        kept.append(stripped)
    cleaned = "\n".join(kept)
    sentences = len(_SENTENCE_END.findall(cleaned))
    return cleaned, None if sentences >= 3 else "fewer than 3 sentences"
