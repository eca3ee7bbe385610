"""Variants of a text that are made without a model: words swapped, left out, replaced, hidden.

Wei & Zou 2019, "EDA: Easy Data Augmentation" (arXiv 1901.11196): of n words, share x n, at least one, are changed. What
is drawn is a function of the text and the seed. Spaces and signs stay where they are. Chinese is taken by characters,
or by jieba's words.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from raylm.config.augmentation import MethodSection
from raylm.data.words import CJK
from raylm.errors import UserError

_PIECE = re.compile(rf"\s+|[{CJK}]+|[^\W{CJK}]+(?:['’-][^\W{CJK}]+)*|.", re.DOTALL)
_CJK_RUN = re.compile(rf"[{CJK}]+")
SHARE, SPAN_SHARE, SPAN_WORDS, MASK = 0.1, 0.15, 3, "[MASK]"

Synonyms = dict[str, list[str]]


class Text:
    """A text cut into pieces, some of which are words; the pieces joined are the text.

    Args:
        text: any text.
        segmenter: characters or jieba, for Chinese.
    """

    def __init__(self, text: str, segmenter: str) -> None:
        self.pieces: list[str] = []
        self.words: list[int] = []
        for piece in _PIECE.findall(text):
            for part in self._cut(piece, segmenter):
                if part[0].isalnum():
                    self.words.append(len(self.pieces))
                self.pieces.append(part)

    @staticmethod
    def _cut(piece: str, segmenter: str) -> list[str]:
        if not _CJK_RUN.fullmatch(piece):
            return [piece]
        return _jieba()(piece) if segmenter == "jieba" else list(piece)

    def __str__(self) -> str:
        return "".join(self.pieces)


class Draw:
    """Random choices that ``key`` alone decides."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "big"))

    def below(self, count: int) -> int:
        """A number in ``range(count)``; of Python's generator only ``random()`` is the same in all versions."""
        return min(count - 1, int(self._random.random() * count))

    def some(self, items: Sequence[int], count: int) -> list[int]:
        """``count`` different ones of ``items``, in the order of drawing, each one of those that are left."""
        left = Places(len(items))
        return [items[left.take(self.below(len(items) - taken))] for taken in range(min(count, len(items)))]

    def two(self, items: Sequence[int]) -> tuple[int, int]:
        """:meth:`some` of two, without looking at all of at least two ``items``."""
        first, second = self.below(len(items)), self.below(len(items) - 1)
        return items[first], items[second + (second >= first)]


class Places:
    """The numbers from 0 to ``count`` - 1, of which any is taken out in the time of a logarithm (Fenwick 1994)."""

    def __init__(self, count: int) -> None:
        # Entry i counts what is left of the (i & -i) numbers before i.
        self._left = [place & -place for place in range(count + 1)]
        self._top = 1 << count.bit_length() >> 1

    def take(self, number: int) -> int:
        """Take out the one with ``number`` smaller ones that are left."""
        place, step = 0, self._top
        while step:
            further = place + step
            if further < len(self._left) and self._left[further] <= number:
                number -= self._left[further]
                place = further
            step >>= 1
        changed = place + 1
        while changed < len(self._left):
            self._left[changed] -= 1
            changed += changed & -changed
        return place


def make_variant(text: str, method: MethodSection, synonyms: Synonyms | None, key: str) -> str:
    """``text`` changed by a ``method`` that needs no model; the same text where it cannot be changed.

    Args:
        synonyms: what :func:`read_synonyms` gave, for the method synonym.
        key: decides what is drawn.
    """
    if method.method == "copy":
        return text
    cut, draw = Text(text, method.segmenter or "characters"), Draw(key)
    share = method.share or (SPAN_SHARE if method.method == "span_mask" else SHARE)
    count = max(1, round(share * len(cut.words)))
    if method.method == "swap":
        _swap(cut, draw, count)
    elif method.method == "delete":
        _delete(cut, draw, count)
    elif method.method == "synonym":
        _replace(cut, draw, count, synonyms or {})
    else:
        _hide(cut, draw, count, method.span_words or SPAN_WORDS, method.mask or MASK)
    return str(cut)


def _swap(text: Text, draw: Draw, count: int) -> None:
    if len(text.words) < 2:
        return
    for _ in range(count):
        left, right = draw.two(text.words)
        text.pieces[left], text.pieces[right] = text.pieces[right], text.pieces[left]


def _delete(text: Text, draw: Draw, count: int) -> None:
    for place in draw.some(text.words, min(count, len(text.words) - 1)):
        text.pieces[place] = ""
        # With it goes the space behind it, or at the end of the text the one before it.
        for neighbour in (place + 1, place - 1):
            if 0 <= neighbour < len(text.pieces) and text.pieces[neighbour].isspace():
                text.pieces[neighbour] = ""
                break


def _replace(text: Text, draw: Draw, count: int, synonyms: Synonyms) -> None:
    known = [place for place in text.words if text.pieces[place].casefold() in synonyms]
    for place in draw.some(known, count):
        word = text.pieces[place]
        choices = synonyms[word.casefold()]
        chosen = choices[draw.below(len(choices))]
        if word.isupper() and len(word) > 1:
            chosen = chosen.upper()
        elif word[0].isupper():
            chosen = chosen[0].upper() + chosen[1:]
        text.pieces[place] = chosen


def _hide(text: Text, draw: Draw, count: int, span: int, mask: str) -> None:
    span = min(span, count, len(text.words))
    if not span:
        return
    # Runs begin at a drawn word and then every ``span`` words, so that no two overlap.
    starts = range(draw.below(min(span, len(text.words) - span + 1)), len(text.words) - span + 1, span)
    for start in draw.some(starts, max(1, round(count / span))):
        first, last = text.words[start], text.words[start + span - 1]
        text.pieces[first : last + 1] = [mask, *[""] * (last - first)]


def read_synonyms(path: str) -> Synonyms:
    """The dictionary file of the method synonym: from each word, case folded, to its synonyms.

    Raises:
        UserError: the file is missing, no UTF-8, or has a line without a tab; names the file and the line.
    """
    key = "data.augmentation.methods.dictionary"
    try:
        content = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path}: not UTF-8 at byte {error.start}") from None
    found: Synonyms = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, *others = (field.strip() for field in line.removeprefix("\ufeff").split("\t"))
        others = [other for other in others if other and other != word]
        if not word or not others:
            raise UserError(f"{path}:{number}: found {line[:60]!r}, allowed: a word, a tab and its synonyms")
        found.setdefault(word.casefold(), []).extend(others)
    if not found:
        raise UserError(f"{key}: {path} holds no word")
    return found


def draw_key(seed: int, text: str, method: MethodSection, number: int) -> str:
    """What decides variant ``number`` of a text by a method."""
    settings = method.model_dump(exclude={"times", "fraction", "dictionary"}, exclude_none=True)
    return json.dumps([seed, settings, number, text], ensure_ascii=False, sort_keys=True)


def _jieba() -> Callable[[str], list[str]]:
    try:
        import rjieba
    except ImportError:
        raise UserError("data.augmentation: segmenter jieba needs rjieba; install raylm[chinese]") from None
    return rjieba.cut
