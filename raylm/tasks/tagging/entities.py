"""From a text to the words that a tagger reads, and from their tags back to places in the text.

Words are what BERT's pre-tokenizer cuts a text into: they part at white space, a punctuation character is a word of its
own (Devlin et al. 2019, the authors' code), and so is a Chinese or Japanese character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raylm.data.samples.tag_schemes import KnownScheme, spans
from raylm.data.words import CJK


@dataclass(frozen=True)
class Entity:
    """A span of a text with its label, or a word with its tag.

    Attributes:
        label: type of the span, or the tag.
        start, end: its characters, ``text[start:end]``.
        score: mean probability of its words' tags.
    """

    label: str
    start: int
    end: int
    score: float


def cut_words(text: str) -> list[tuple[int, int]]:
    """First character of each word and the one behind its last."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import BertPreTokenizer, Sequence, Split

    steps = Sequence([BertPreTokenizer(), Split(Regex(f"[{CJK}]"), "isolated")])
    return [place for _, place in steps.pre_tokenize_str(text)]


def entities(
    words: Sequence[tuple[int, int]], tags: Sequence[str], scores: Sequence[float], scheme: KnownScheme
) -> list[Entity]:
    """The spans of a text; of tags without spans all its words.

    Args:
        words: of :func:`cut_words`.
        tags, scores: of each word.
    """
    if scheme == "none":
        return [Entity(tag, *place, score) for place, tag, score in zip(words, tags, scores, strict=True)]
    return [
        Entity(span.type, words[span.first][0], words[span.last][1], float(np.mean(scores[span.first : span.last + 1])))
        for span in spans(tags)
    ]
