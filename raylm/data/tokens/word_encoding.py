"""Byte-level BPE by table: a text is cut into words as GPT-2 does, and each word's ids are looked up.

What a text holds is mostly words that came before. The ``tokenizers`` library encodes each new word once; the ids are
the same as the library's for the whole text, at several times its speed. Texts with characters outside of ``_RANGES``,
whose classes could differ between Unicode versions, and tokenizers of another kind are left to the library.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

# What has been in Unicode for long: Latin, Greek, Cyrillic, punctuation, mathematics, Chinese, Japanese.
_RANGES = (
    (0x00, 0x7F),
    (0xA0, 0x24F),
    (0x370, 0x4FF),
    (0x2010, 0x2027),
    (0x2030, 0x205E),
    (0x20A0, 0x20AC),
    (0x2190, 0x22FF),
    (0x2500, 0x25FF),
    (0x3000, 0x30FF),
    (0x4E00, 0x9FA5),
    (0xFF01, 0xFF5E),
)
# White space as Unicode has it; Python's \s also takes the separators 0x1c to 0x1f.
_SPACE = "\t-\r \xa0\u3000"
# What the library's cutting (Radford et al. 2019, the released code) is, over ASCII alone and over all of the ranges.
_CUT = (
    r"'(?:[stmd]|re|ve|ll)| ?[{letters}]+| ?[{digits}]+| ?[^{space}{letters}{digits}]+"
    r"|[{space}]+(?![^{space}])|[{space}]+"
)
# Between two such letters the cut always falls on the space.
_SAFE = re.compile(r"[A-Za-z](?= [A-Za-z])")
# Bounds what the words of one call and the table take in memory.
BATCH_CHARACTERS = 1 << 19
MOST_WORDS = 1 << 17


def _class(categories: str) -> str:
    """The characters of the ranges whose category begins with one of ``categories``, for a regular expression."""
    found = [
        code
        for first, last in _RANGES
        for code in range(first, last + 1)
        if unicodedata.category(chr(code))[0] in categories
    ]
    breaks = [0, *(place for place in range(1, len(found)) if found[place] != found[place - 1] + 1), len(found)]
    return "".join(
        f"{re.escape(chr(found[begin]))}-{re.escape(chr(found[end - 1]))}" for begin, end in itertools.pairwise(breaks)
    )


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """How ASCII and other text is cut, and what tells that the other text has none but known characters."""
    plain = re.compile(_CUT.format(letters="A-Za-z", digits="0-9", space="\t-\r "))
    letters, digits = _class("L"), _class("N")
    known = re.compile(f"[{letters}{digits}{_class('MPSZ')}\\x00-\\x7f]*")
    return plain, re.compile(_CUT.format(letters=letters, digits=digits, space=_SPACE)), known


class _Table(dict):
    """Word to number; new words are numbered and gathered in ``fresh``."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.fresh.append(word)
        return number


def applies_to(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is one that encodes word by word as this file takes it: byte-level BPE with GPT-2's cut."""
    rules = json.loads(tokenizer.to_str())
    splitter = rules["pre_tokenizer"] or {}
    return (
        rules["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and splitter.get("use_regex", True)
        and rules["model"].get("type") == "BPE"
        and not rules["model"].get("dropout")
        and all(token["special"] for token in rules["added_tokens"])
    )


class WordEncoder:
    """Encodes texts as text, special tokens included, each with an end-of-text token after it.

    Args:
        tokenizer: one that :func:`applies_to`; encodes the words that are new.
        eos_id: id that ends each text.
    """

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self._tokenizer, self._eos_id = tokenizer, eos_id
        self._reset()

    def _reset(self) -> None:
        self._table = _Table()
        self._table[""] = 0
        # Of word n the ids are ids[starts[n] : starts[n] + lengths[n]]; word 0 is the end of a text.
        self._ids = np.array([self._eos_id], dtype=np.int64)
        self._starts, self._lengths = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64 [tokens + 1], its end-of-text token last."""
        found: list[np.ndarray] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                found.extend(self._encode(batch))
                batch, size = [], 0
        if batch:
            found.extend(self._encode(batch))
        return found

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        plain, wide, known = _patterns()
        words: list[str] = []
        ends: list[int] = []
        alone: dict[int, np.ndarray] = {}
        for place, text in enumerate(texts):
            if len(text) > 2 * BATCH_CHARACTERS or not (text.isascii() or known.fullmatch(text)):
                alone[place] = self._encode_alone(text)
            else:
                words += (plain if text.isascii() else wide).findall(text)
                words.append("")
                ends.append(len(words))
        looked_up = iter(self._look_up(words, ends) if words else [])
        return [alone[place] if place in alone else next(looked_up) for place in range(len(texts))]

    def _encode_alone(self, text: str) -> np.ndarray:
        """The ids of a text that is long, piece by piece, or that the library has to encode."""
        parts = [
            np.array(self._tokenizer.encode(piece, add_special_tokens=False).ids, dtype=np.int64)
            for piece in _pieces(text)
        ]
        return np.concatenate([*parts, [self._eos_id]])

    def _look_up(self, words: list[str], ends: list[int]) -> list[np.ndarray]:
        if len(self._table) > MOST_WORDS:
            self._reset()
        numbers = np.fromiter(map(self._table.__getitem__, words), dtype=np.int64, count=len(words))
        if self._table.fresh:
            self._learn()
        lengths = self._lengths[numbers]
        token_ends = np.cumsum(lengths)
        places = np.repeat(self._starts[numbers] - (token_ends - lengths), lengths)
        places += np.arange(len(places))
        ids = self._ids[places]
        edges = [0, *token_ends[np.array(ends) - 1].tolist()]
        return [ids[begin:end] for begin, end in itertools.pairwise(edges)]

    def _learn(self) -> None:
        encodings = self._tokenizer.encode_batch_fast(self._table.fresh, add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        self._ids = np.concatenate([self._ids, np.array([item for row in rows for item in row], dtype=np.int64)])
        self._starts, self._lengths = np.concatenate([self._starts, starts]), np.concatenate([self._lengths, lengths])
        self._table.fresh = []


def _pieces(text: str) -> Iterator[str]:
    """``text`` cut where its words are cut anyway, so that no call has to hold all of its tokens."""
    begin = 0
    while len(text) - begin > BATCH_CHARACTERS:
        cut = _SAFE.search(text, begin + BATCH_CHARACTERS)
        if cut is None:
            break
        yield text[begin : cut.end()]
        begin = cut.end()
    yield text[begin:]
