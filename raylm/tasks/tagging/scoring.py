"""How well tags agree: words with the right one, and spans that are right as a whole.

Spans are found in both sequences of tags by conlleval's rules (:func:`raylm.data.samples.tag_schemes.spans`); one is
right where first word, last word and type are (Tjong Kim Sang and De Meulder 2003). The figures are those of the
package seqeval in its default mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar

from raylm.data.samples.tag_schemes import KnownScheme, Span, spans


@dataclass(frozen=True)
class Counts:
    """Sums over sentences.

    Attributes:
        words: with a tag.
        right_words: whose tag is the right one.
        right: spans that were found and are there.
        found: spans that were found.
        there: spans in the data.
    """

    words: int = 0
    right_words: int = 0
    right: int = 0
    found: int = 0
    there: int = 0

    NAMES: ClassVar[tuple[str, ...]] = ("words", "right_words", "right", "found", "there")

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + another for one, another in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> tuple[int, ...]:
        """All of them, in the order of ``NAMES``."""
        return astuple(self)

    @property
    def accuracy(self) -> float:
        """Share of the words whose tag is right."""
        return self.right_words / max(1, self.words)

    @property
    def precision(self) -> float:
        """Share of the spans found that are right; 0 where none was found."""
        return self.right / max(1, self.found)

    @property
    def recall(self) -> float:
        """Share of the spans there that were found; 0 where there are none."""
        return self.right / max(1, self.there)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.right / max(1, self.found + self.there)


def count(expected: Sequence[str], found: Sequence[str], scheme: KnownScheme) -> Counts:
    """The counts of one sentence's tags; spans only of a scheme that has them."""
    right_words = sum(one == other for one, other in zip(expected, found, strict=True))
    if scheme == "none":
        return Counts(len(expected), right_words)
    there, said = set(spans(expected)), set(spans(found))
    return Counts(len(expected), right_words, len(there & said), len(said), len(there))


def count_types(expected: Sequence[str], found: Sequence[str], scheme: KnownScheme) -> dict[str, Counts]:
    """The counts by type of span; of tags without spans by tag, each word a span of its own."""
    if scheme == "none":
        there, said = ({Span(n, n, tag) for n, tag in enumerate(tags)} for tags in (expected, found))
    else:
        there, said = set(spans(expected)), set(spans(found))
    totals: dict[str, list[int]] = {}
    for place, group in enumerate((there & said, said, there)):
        for span in group:
            totals.setdefault(span.type, [0, 0, 0])[place] += 1
    return {kind: Counts(0, 0, *numbers) for kind, numbers in totals.items()}
