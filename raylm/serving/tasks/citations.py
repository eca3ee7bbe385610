"""Which passage each sentence of an answer rests on, found after it was written (Gao et al. 2023, "post-hoc citing").

A small model cannot be trusted to cite. A sentence is followed by ``[n]`` where passage n has at least half of its
content words; a sentence without such a passage gets none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from raylm.serving.retrieval.text import content_words, tokenize

# Share of a sentence's content words that a passage must have.
LEAST_SUPPORT = 0.5
_END = re.compile(r"[.!?](?=\s)|[。！？]")


class Citer:
    """Adds citations to a text that comes in pieces.

    Args:
        passages: texts of the passages with their titles; the first is ``[1]``.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        self._passages = [frozenset(tokenize(passage)) for passage in passages]
        self._sentence = ""

    def push(self, text: str) -> str:
        """``text`` with the citations of the sentences that end in it; a last full stop waits for what comes next."""
        given, self._sentence = len(self._sentence), self._sentence + text
        out = []
        while match := _END.search(self._sentence, max(0, given - 1)):
            out += [self._sentence[given : match.end()], self._citation(self._sentence[: match.end()])]
            self._sentence, given = self._sentence[match.end() :], 0
        out.append(self._sentence[given:])
        return "".join(out)

    def finish(self) -> str:
        """The citation of the last sentence."""
        sentence, self._sentence = self._sentence, ""
        return self._citation(sentence)

    def _citation(self, sentence: str) -> str:
        words = content_words(tokenize(sentence))
        if not words or not self._passages:
            return ""
        support = [sum(word in passage for word in words) / len(words) for passage in self._passages]
        best = max(range(len(support)), key=support.__getitem__)
        return f" [{best + 1}]" if support[best] >= LEAST_SUPPORT else ""
