"""``data.cleaning`` applied to documents: what is changed, what is dropped, and the account of both.

In: documents, many at a time. Out: cleaned documents. The account of a block is a plain dictionary, so that the driver
can add up all blocks in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raylm.config.cleaning import CleaningSection
from raylm.data.cleaning.changes import changes_of
from raylm.data.cleaning.quality import c4_lines, gopher_quality
from raylm.data.cleaning.repetition import gopher_repetition
from raylm.data.sources.documents import Document, make_conversation, make_pair
from raylm.data.words import WordTable, words_of

CHINESE = {"zh", "wuu", "yue"}
MOST_EXAMPLES = 3
EXAMPLE_CHARACTERS = 240
# The shortest text that Gopher's rules were made for (Rae et al. 2021, A.1.1).
LEAST_ANSWER_WORDS = 50


@dataclass(frozen=True)
class Cleaned:
    """A document that cleaning has kept.

    Attributes:
        document: cleaned.
        hashes: of its words, letter case apart, uint64; None where no filter has looked at words.
    """

    document: Document
    hashes: np.ndarray | None = None


@dataclass(frozen=True)
class Texts:
    """What filters judge: documents, their texts, and the words of each, as they stand and as numbers."""

    documents: list[Document]
    texts: list[str]
    words: list[list[str]]
    numbers: list[np.ndarray]
    table: WordTable


Filter = Callable[[Texts], list[str | None]]


class Account:
    """What cleaning did: by change how many documents it touched; by filter and reason what it dropped."""

    def __init__(self) -> None:
        self.changed: dict[str, int] = {}
        self.dropped: dict[str, dict[str, int]] = {}
        self.examples: dict[str, list[dict[str, str]]] = {}

    def change(self, name: str) -> None:
        """Count a document that ``name`` changed."""
        self.changed[name] = self.changed.get(name, 0) + 1

    def drop(self, name: str, reason: str, text: str) -> None:
        """Count a document that ``name`` dropped for ``reason``, and keep some as examples."""
        reasons = self.dropped.setdefault(name, {})
        reasons[reason] = reasons.get(reason, 0) + 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append({"reason": reason, "text": text[:EXAMPLE_CHARACTERS]})

    def to_json(self) -> dict[str, Any]:
        """The account as JSON."""
        return {"changed": self.changed, "dropped": self.dropped, "examples": self.examples}


class Cleaner:
    """Applies a ``cleaning`` section.

    Args:
        section: what to do.
        account: where it is counted.

    Raises:
        UserError: a library that is asked for is missing.
    """

    def __init__(self, section: CleaningSection, account: Account) -> None:
        self._section, self._account = section, account
        self._changes = changes_of(section)
        self._filters = _filters(section)
        self._table = WordTable()

    def clean(self, documents: Sequence[Document]) -> list[Cleaned | None]:
        """Each document cleaned; None where it is dropped."""
        kept: dict[int, Document] = {}
        for place, document in enumerate(documents):
            changed = self._change(document) if self._changes else document
            if self._section.c4 and document.kind == "documents":
                changed = self._keep_sentences(changed)
            if changed is not None:
                kept[place] = changed
        hashes: dict[int, np.ndarray] = {}
        if self._filters:
            self._table.trim()
            words = {place: words_of(document.text) for place, document in kept.items()}
            numbers = {place: self._table.numbers(each) for place, each in words.items()}
            for name, judge in self._filters.items():
                places = list(kept)
                judged = [kept[place] for place in places]
                texts, columns = (
                    [each.text for each in judged],
                    [[each[place] for place in places] for each in (words, numbers)],
                )
                reasons = judge(Texts(judged, texts, *columns, self._table))
                for place, reason in zip(places, reasons, strict=True):
                    if reason is not None:
                        self._account.drop(name, reason, kept.pop(place).text)
            hashes = {place: self._table.hashes(numbers[place]) for place in kept}
        return [Cleaned(kept[place], hashes.get(place)) if place in kept else None for place in range(len(documents))]

    def _keep_sentences(self, document: Document) -> Document | None:
        text, reason = c4_lines(document.text)
        if reason is not None:
            self._account.drop("c4", reason, document.text)
            return None
        if text == document.text:
            return document
        self._account.change("c4")
        return replace(document, text=text)

    def _change(self, document: Document) -> Document:
        parts = _parts_of(document)
        for name, change in self._changes.items():
            changed = [change(part) for part in parts]
            if changed != parts:
                self._account.change(name)
                parts = changed
        if document.kind == "documents":
            return document if parts[0] is document.text else replace(document, text=parts[0])
        if document.kind == "conversations":
            turns = [turn | {"content": part} for turn, part in zip(document.turns, parts, strict=True)]
            emptied = any(
                turn["role"] == "assistant" and not (turn["content"].strip() or turn.get("tool_calls"))
                for turn in turns
            )
            made = make_conversation(turns, [])
            return replace(document, text="" if emptied else made.text, messages=made.messages)
        prompt, answer, context = parts
        if not (prompt.strip() and answer.strip()):
            return replace(document, text="", prompt="", answer="", context="")
        pair = make_pair(prompt, answer, context)
        return replace(document, text=pair.text, prompt=prompt, answer=answer, context=context)


def _parts_of(document: Document) -> list[str]:
    """The texts that a document is made of."""
    if document.kind == "conversations":
        return [turn["content"] for turn in document.turns]
    return [document.prompt, document.answer, document.context] if document.prompt else [document.text]


def _filters(section: CleaningSection) -> dict[str, Filter]:
    found: dict[str, Filter] = {}
    if section.length is not None:
        found["length"] = _length_filter(section)
    if section.language is not None:
        found["language"] = _language_filter(section)
    if section.repetition:
        found["repetition"] = _judge_repetition
    if section.gopher:
        found["gopher"] = lambda batch: list(map(gopher_quality, batch.texts, batch.words))
    return found


def _judge_repetition(batch: Texts) -> list[str | None]:
    """Of pairs and conversations the answers are judged: a context and what is asked and said about it rightly share
    their words."""
    if not batch.texts:
        return []
    texts, numbers = list(batch.texts), list(batch.numbers)
    for place, document in enumerate(batch.documents):
        if document.kind != "documents":
            words = words_of(document.answers)
            is_long = len(words) >= LEAST_ANSWER_WORDS
            texts[place] = document.answers if is_long else ""
            numbers[place] = batch.table.numbers(words if is_long else [])
    return gopher_repetition(texts, numbers, batch.table.lengths(np.concatenate(numbers)))


def _length_filter(section: CleaningSection) -> Filter:
    bounds = section.length

    def judge(text: str, words: list[str]) -> str | None:
        for unit, count, least, most in (
            ("characters", len(text), bounds.min_characters, bounds.max_characters),
            ("words", len(words), bounds.min_words, bounds.max_words),
        ):
            if count < least:
                return f"fewer than {least} {unit}"
            if most is not None and count > most:
                return f"more than {most} {unit}"
        return None

    return lambda batch: list(map(judge, batch.texts, batch.words))


def _language_filter(section: CleaningSection) -> Filter:
    import py3langid

    keep, characters = set(section.language.keep), section.language.characters
    if "zh" in keep:
        # Standard Chinese is often taken for Wu (31 of the 256 passages of CMRC's trial set).
        keep |= CHINESE

    def judge(text: str) -> str | None:
        found = py3langid.classify(text[:characters])[0]
        return None if found in keep else found

    return lambda batch: list(map(judge, batch.texts))
