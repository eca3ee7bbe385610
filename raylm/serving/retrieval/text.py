"""From texts to what is indexed: words for BM25, and passages as offsets into their document.

Dotted names count as a whole and by their parts, so that ``json.dumps`` finds the document of that title before all
others that mention it. Text without spaces between words (Chinese, kana) counts by characters and pairs of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bm25s.stopwords import STOPWORDS_CHINESE, STOPWORDS_EN_PLUS

# Passages end at the first paragraph end after this weight: about a hundred words.
PASSAGE_WEIGHT = 600
# A paragraph over this weight is cut between sentences, a sentence over it between words: an encoder reads no more.
LONGEST_WEIGHT = 1500
# What a character of a script without spaces weighs: it is about a token, of which an English word has 4 to 5 letters.
UNSPACED_WEIGHT = 3

_DOTTED = re.compile(r"\w+(?:\.\w+)*")
# Scripts without spaces between words: Chinese characters and Japanese kana.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_RUNS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_PARAGRAPH = re.compile(r"(?:(?!\n\s*\n).)+", re.DOTALL)
# A sentence with what ends it, or a line.
_SENTENCE = re.compile(r"(?:(?![.!?]\s|[。！？；]|\n).)*(?:[.!?。！？；\n]|.$)?\s*", re.DOTALL)


def stem(word: str) -> str:
    """The S-stemmer (Harman 1991): plural to singular, and nothing else."""
    if len(word) > 3 and word.endswith("ies") and word[-4] not in "ae":
        return f"{word[:-3]}y"
    if len(word) > 3 and word.endswith("es") and word[-3] not in "aeo":
        return word[:-1]
    if len(word) > 3 and word.endswith("s") and word[-2] not in "us":
        return word[:-1]
    return word


def tokenize(text: str) -> list[str]:
    """Words of ``text`` in lower case and singular; ``os.path.join`` gives the whole name, ``os``, ``path``, ``join``.

    Names with underscores count as a whole and by their parts too.
    """
    words: list[str] = []
    for name in _DOTTED.findall(text.lower()):
        parts = name.split(".")
        if len(parts) > 1:
            words.append(name)
        for part in parts:
            if _UNSPACED.search(part):
                words += _unspaced(part)
                continue
            words.append(stem(part))
            words += [stem(piece) for piece in part.split("_") if piece] if "_" in part.strip("_") else []
    return words


def content_words(words: list[str]) -> list[str]:
    """Those of ``words`` that say what a question is about, each once; all of them where none is left."""
    return list(dict.fromkeys(word for word in words if not _is_stop_word(word)) or dict.fromkeys(words))


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


def _unspaced(part: str) -> Iterator[str]:
    """Characters and pairs of characters of the unspaced runs of ``part``, and the runs between them as words.

    On CMRC 2018 this finds more than the words of a segmenter do (README, "Measured").
    """
    for run in _RUNS.findall(part):
        if _UNSPACED.match(run):
            yield from run
            yield from (run[place : place + 2] for place in range(len(run) - 1))
        else:
            yield stem(run)


def _units(text: str) -> Iterator[tuple[int, int]]:
    """Paragraphs, or parts of those that are too long."""
    for paragraph in _PARAGRAPH.finditer(text):
        start, end = _stripped(text, *paragraph.span())
        if _weigh(text[start:end]) <= LONGEST_WEIGHT:
            if start < end:
                yield start, end
            continue
        for sentence in _SENTENCE.finditer(text, start, end):
            begin, stop = _stripped(text, *sentence.span())
            while begin < stop:
                cut = _fitting(text, begin, stop)
                piece_start, piece_end = _stripped(text, begin, cut)
                if piece_start < piece_end:
                    yield piece_start, piece_end
                begin = cut


def _fitting(text: str, start: int, end: int) -> int:
    """Where to cut ``text`` after ``start`` so that the piece is not too heavy, between words where there are any."""
    if _weigh(text[start:end]) <= LONGEST_WEIGHT:
        return end
    weight, cut = 0, start
    while weight < LONGEST_WEIGHT and cut < end:
        weight += UNSPACED_WEIGHT if _UNSPACED.match(text[cut]) else 1
        cut += 1
    space = max(text.rfind(" ", start, cut), text.rfind("\n", start, cut))
    return space + 1 if space > start else cut


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _weigh(text: str) -> int:
    return len(text) + (UNSPACED_WEIGHT - 1) * len(_UNSPACED.findall(text))


def _is_stop_word(word: str) -> bool:
    # A pair of characters with one that is a stop word by itself crosses the end of a word.
    return word in _STOP_WORDS or (bool(_UNSPACED.match(word)) and any(each in _STOP_WORDS for each in word))


_STOP_WORDS = frozenset(map(stem, STOPWORDS_EN_PLUS)) | frozenset(STOPWORDS_CHINESE)
