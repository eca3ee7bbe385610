"""What goes into a collection, what a search finds in it, and what it says about itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from raylm.data.samples.passages import passage_spans

PassageRow = tuple[int, int, str, str, str, bytes | None]
"""Of a passage: its number, its document's, title, aliases, text, and its vector, fp32 of length 1, or None."""


@dataclass(frozen=True)
class StoredDocument:
    """A document as it is put into a collection; ``aliases`` are other names, with spaces between."""

    id: str
    title: str
    text: str
    aliases: str = ""

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where its passages begin and end, in characters."""
        return list(passage_spans(self.text))

    @property
    def bytes(self) -> int:
        """What it counts in a quota: its title and text in UTF-8."""
        return len(self.title.encode()) + len(self.text.encode())

    def to_embed(self) -> list[str]:
        """What the vector of each passage is made of."""
        return [embedded_text(self.title, self.text[start:end]) for start, end in self.spans]


def embedded_text(title: str, passage: str) -> str:
    """What a passage's vector is made of: its document's title and the passage itself."""
    return "\n".join(filter(None, [title, passage]))


@dataclass(frozen=True)
class Passage:
    """A piece of a document: ``document text[start:end]``, with the document's id, title and other names."""

    id: str
    title: str
    text: str
    aliases: str = ""
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Match:
    """A passage that was found: how well it fits (higher is better), and its relevance from 0 to 1."""

    passage: Passage
    score: float
    relevance: float


@dataclass(frozen=True)
class Facts:
    """What a collection says about itself.

    Attributes:
        name: of the collection.
        created: when, in seconds since 1970.
        version: grows with each change.
        documents, passages: how many there are.
        embedded: passages with a vector.
        bytes: of all titles and texts in UTF-8.
    """

    name: str
    created: int
    version: int
    documents: int
    passages: int
    embedded: int
    bytes: int


@dataclass(frozen=True)
class Usage:
    """What several collections hold together."""

    documents: int = 0
    bytes: int = 0
