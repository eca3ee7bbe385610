"""From texts to what is indexed: words for BM25.

Dotted names count as a whole and by their parts, so that ``json.dumps`` finds the document of that title before all
others that mention it. Text without spaces between words (Chinese, kana) counts by characters and pairs of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bm25s.stopwords import STOPWORDS_CHINESE, STOPWORDS_EN_PLUS

from raylm.data.samples.passages import UNSPACED

_DOTTED = re.compile(r"\w+(?:\.\w+)*")
_RUNS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


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
            if UNSPACED.search(part):
                words += _unspaced(part)
                continue
            words.append(stem(part))
            words += [stem(piece) for piece in part.split("_") if piece] if "_" in part.strip("_") else []
    return words


def content_words(words: list[str]) -> list[str]:
    """Those of ``words`` that say what a question is about, each once; stop words, which say nothing, are none."""
    # Of a stop word of two characters (什么) neither one counts for itself.
    halves = {half for word in words if word in _STOP_PAIRS for half in word}
    return list(dict.fromkeys(word for word in words if word not in halves and not _is_stop_word(word)))


def keys_of(name: str, *, is_first: bool) -> set[str]:
    """What a passage of the document called ``name`` is looked up by; the document's first one by the whole name too.

    See :func:`keys_in`; a question that asks about nothing but the name is answered from the document's beginning.
    """
    if not name:
        return set()
    dotted = {name, f"~{name.lower()}"} if "." in name and " " not in name else set()
    return dotted | {_whole(name)} if is_first else dotted


def keys_in(question: str) -> set[str]:
    """Keys of the documents that ``question`` names.

    It names the document whose title is all that it asks about ("What does copy do?"), and every dotted name in it, in
    its own case before others: ``inspect.signature`` is not ``inspect.Signature``. A stop word may be a title, too.
    """
    keys = {key for name in _DOTTED.findall(question) if "." in name for key in (name, f"~{name.lower()}")}
    words = tokenize(question)
    return keys | ({_whole(question)} if content_words(words) else {_whole(word) for word in words})


def _whole(text: str) -> str:
    words = tokenize(text)
    return "=" + " ".join(content_words(words) or dict.fromkeys(words))


def _unspaced(part: str) -> Iterator[str]:
    """Characters and pairs of characters of the unspaced runs of ``part``, and the runs between them as words.

    On CMRC 2018 this finds more than the words of a segmenter do (README, "Measured").
    """
    for run in _RUNS.findall(part):
        if UNSPACED.match(run):
            yield from run
            yield from (run[place : place + 2] for place in range(len(run) - 1))
        else:
            yield stem(run)


def _is_stop_word(word: str) -> bool:
    # A pair of characters with one that is a stop word by itself crosses the end of a word.
    return word in _STOP_WORDS or (bool(UNSPACED.match(word)) and any(each in _STOP_WORDS for each in word))


_STOP_WORDS = frozenset(map(stem, STOPWORDS_EN_PLUS)) | frozenset(STOPWORDS_CHINESE)
_STOP_PAIRS = frozenset(word for word in STOPWORDS_CHINESE if len(word) == 2 and UNSPACED.match(word))
