"""The variants of documents: made here or asked of a served model, marked and counted, without those that are none."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

from raylm.config.augmentation import SERVED_METHODS, AugmentationSection, MethodSection
from raylm.data.augmentation.prompts import ask_for_pair, ask_for_text
from raylm.data.augmentation.served_model import ServedModel, Unanswered
from raylm.data.augmentation.word_edits import Synonyms, draw_key, make_variant, read_synonyms
from raylm.data.cleaning.contamination import Contamination
from raylm.data.sources.documents import Document, hash_share, make_pair

MOST_EXAMPLES = 2
EXAMPLE_CHARACTERS = 240
_PURPOSE = b"raylm-augment"


class VariantMaker:
    """Makes the variants of documents and counts them.

    Args:
        section: what is asked for.
        contamination: evaluation texts that no variant may hold.

    Attributes:
        served: the model that is asked.
        made: variants by method.
        dropped: variants that are their original or one before them, or hold evaluation text, by reason.
        examples: by method, some originals and what was made of them.
    """

    def __init__(self, section: AugmentationSection, contamination: Contamination | None) -> None:
        self._section, self._contamination = section, contamination
        self._synonyms: list[Synonyms | None] = [
            read_synonyms(method.dictionary) if method.dictionary else None for method in section.methods
        ]
        self.served: ServedModel | None = None
        self.made: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def start(self, document: Document) -> list[tuple[MethodSection, int, Any]]:
        """(method, number, variant or a task that gives it) for everything that is wanted of ``document``."""
        found = []
        for method, synonyms in zip(self._section.methods, self._synonyms, strict=True):
            key = draw_key(self._section.seed, document.text, method, 0)
            if method.fraction < 1 and hash_share(key, _PURPOSE) >= method.fraction:
                continue
            for number in range(1, method.times + 1):
                key = draw_key(self._section.seed, document.text, method, number)
                if method.method in SERVED_METHODS:
                    made: Any = asyncio.ensure_future(self._ask(document, method, key))
                else:
                    text = make_variant(_part(document, method), method, synonyms, key)
                    made = _with_part(document, method, text)
                found.append((method, number, made))
        return found

    async def _ask(self, document: Document, method: MethodSection, key: str) -> Document:
        seed = int(hash_share(key, _PURPOSE) * 2**31)
        if method.method == "generate" and document.prompt:
            prompt, answer = await ask_for_pair(self.served, method, document, seed)
            return make_pair(prompt, answer, document.context)
        text = await ask_for_text(self.served, method, _part(document, method), seed)
        return _with_part(document, method, text)

    async def finish(self, document: Document, tasks: list[tuple[MethodSection, int, Any]]) -> list[Document]:
        """The variants of ``document`` that :meth:`start` began, marked, without those that are no variants."""
        found, texts = [], {document.text}
        for method, number, made in tasks:
            if isinstance(made, asyncio.Future):
                try:
                    made = await made
                except Unanswered as error:
                    self.served.fail(str(error))
                    continue
            if method.method != "copy" and made.text in texts:
                self.dropped["unchanged"] += 1
                continue
            if self._contamination is not None and self._contamination.found_in(made.text):
                self.dropped["decontamination"] += 1
                continue
            texts.add(made.text)
            kept = {
                "label": document.label,
                "split": "train",
                "augmentation": f"{method.method}:{document.id}:{number}",
            }
            if method.method != "generate":
                kept |= {"title": document.title, "aliases": document.aliases}
            found.append(replace(made, **kept))
            self.made[method.method] += 1
            examples = self.examples.setdefault(method.method, [])
            if len(examples) < MOST_EXAMPLES:
                shown = {"original": document.text, "variant": made.text}
                examples.append({name: text[:EXAMPLE_CHARACTERS] for name, text in shown.items()})
        return found


def _part(document: Document, method: MethodSection) -> str:
    """The text that a method works on."""
    return getattr(document, method.part or "prompt") if document.prompt else document.text


def _with_part(document: Document, method: MethodSection, text: str) -> Document:
    """``document`` with another text in that place; the same one where nothing would be left of a pair."""
    if not document.prompt:
        return Document(text=text) if text.strip() else document
    parts = {name: getattr(document, name) for name in ("prompt", "answer", "context")}
    parts[method.part or "prompt"] = text
    if not (parts["prompt"].strip() and parts["answer"].strip()):
        return document
    return make_pair(**parts)
