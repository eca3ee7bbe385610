"""Documents cut into passages: the pieces that retrieval finds, and that pairs are trained to answer from.

``/v1/qa`` shows a model passages of this cut, so a pair whose context is one is a pair as the model will be asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Passages end at the first paragraph end after this weight: about a hundred words.
PASSAGE_WEIGHT = 600
# A paragraph over this weight is cut between sentences, a sentence over it between words: an encoder reads no more.
LONGEST_WEIGHT = 1500
# What a character of a script without spaces weighs: it is about a token, of which an English word has 4 to 5 letters.
UNSPACED_WEIGHT = 3

# Scripts without spaces between words: Chinese characters and Japanese kana.
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# Searched for from each place where one may begin, and nowhere twice: a text of white space alone costs no more than
# any other.
_PARAGRAPH_END = re.compile(r"\n\s*\n")
# What ends a sentence, or a line.
_SENTENCE_END = re.compile(r"(?:[.!?]\s|[。！？；\n])\s*")


def passage_spans(text: str) -> Iterator[tuple[int, int]]:
    """Cut ``text`` into passages of some :data:`PASSAGE_WEIGHT`, between paragraphs where there are any.

    Yields:
        Offsets (start, end) in characters, in order; between them is only white space.
    """
    start, end, weight = 0, 0, 0
    for unit_start, unit_end in _units(text):
        added = _weigh(text[unit_start:unit_end])
        if weight and weight + added > LONGEST_WEIGHT:
            yield start, end
            weight = 0
        start = start if weight else unit_start
        end = unit_end
        weight += added
        if weight >= PASSAGE_WEIGHT:
            yield start, end
            weight = 0
    if weight:
        yield start, end


def _units(text: str) -> Iterator[tuple[int, int]]:
    """Paragraphs, or parts of those that are too long."""
    for span in _between(_PARAGRAPH_END, text, 0, len(text)):
        start, end = _stripped(text, *span)
        if _fits(text, start, end):
            if start < end:
                yield start, end
            continue
        for sentence in _between(_SENTENCE_END, text, start, end):
            begin, stop = _stripped(text, *sentence)
            while begin < stop:
                cut = _fitting(text, begin, stop)
                piece_start, piece_end = _stripped(text, begin, cut)
                if piece_start < piece_end:
                    yield piece_start, piece_end
                begin = cut


def _between(ends: re.Pattern[str], text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """What lies up to and with each match of ``ends``, and behind the last one."""
    for end in ends.finditer(text, start, stop):
        yield start, end.end()
        start = end.end()
    if start < stop:
        yield start, stop


def _fits(text: str, start: int, end: int) -> bool:
    """Whether a piece may stay whole; no character weighs less than 1, so that a long one need not be weighed."""
    return end - start <= LONGEST_WEIGHT and _weigh(text[start:end]) <= LONGEST_WEIGHT


def _fitting(text: str, start: int, end: int) -> int:
    """Where to cut ``text`` after ``start`` so that the piece is not too heavy, between words where there are any."""
    if _fits(text, start, end):
        return end
    weight, cut = 0, start
    while weight < LONGEST_WEIGHT and cut < end:
        weight += UNSPACED_WEIGHT if UNSPACED.match(text[cut]) else 1
        cut += 1
    space = max(text.rfind(" ", start, cut), text.rfind("\n", start, cut))
    return space + 1 if space > start else cut


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _weigh(text: str) -> int:
    return len(text) + (UNSPACED_WEIGHT - 1) * len(UNSPACED.findall(text))
