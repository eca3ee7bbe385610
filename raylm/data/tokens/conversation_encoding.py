"""Conversations to token ids, with what the assistant says marked.

A conversation is rendered by the chat template as a whole. What is asked before an answer is encoded just as a server
encodes it; so the ids that are trained on are those that are served.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raylm.data.chat import neutralize
from raylm.data.sources.conversations import ASSISTANT
from raylm.data.sources.documents import Document
from raylm.data.tokens.encoding import load_backend
from raylm.data.tokens.templates import ChatTemplate
from raylm.errors import UserError

Places = list[tuple[int, int]]


class ConversationEncoder:
    """Lays out conversations with the chat template of a tokenizer directory.

    Where the template has ``{% generation %}``, that marks the answers; else the conversation is rendered up to each
    answer and behind it. What reads as a special token inside a message is neutralized first.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_backend(directory)
        self._template = ChatTemplate(directory, self._tokenizer)
        self._added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def encode(self, documents: Sequence[Document]) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
        """Tokens of each conversation; int64 [n, 1], where its first answer begins; and for each of its tokens whether
        the assistant writes it, bool.

        Raises:
            UserError: the template refuses a conversation, or renders the same turns differently when others follow.
        """
        tokens, first, counted = [], [], []
        for document in documents:
            ids, mask = self._encode(document)
            tokens.append(ids)
            counted.append(mask)
            # Behind the last token where nothing is counted.
            first.append(int(np.argmax(mask)) if mask.any() else len(ids))
        return tokens, np.array(first, dtype=np.int64).reshape(-1, 1), counted

    def _encode(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        turns, tools = self._safe(document), json.loads(document.tools) if document.tools else None
        what = f"the conversation that begins {document.text[:60]!r}"
        text, answers = self._rendered(turns, tools, what)
        ids, offsets = self._tokens(text, [start for start, _ in answers])
        mask = np.zeros(len(ids), dtype=bool)
        counted = [turn.get("weight", 1) == 1 for turn in turns if turn["role"] == ASSISTANT]
        for (start, end), counts in zip(answers, counted, strict=True):
            if counts:
                mask |= (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return ids, mask

    def _safe(self, document: Document) -> list[dict[str, Any]]:
        return [turn | {"content": neutralize(turn["content"], self._template.special)} for turn in document.turns]

    def _rendered(self, turns: list[dict[str, Any]], tools: list[Any] | None, what: str) -> tuple[str, Places]:
        """The text, and where each answer stands in it."""
        given = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT]
        if self._template.marks_answers:
            text, marks = self._template.render_marked(given, what, tools)
            if len(marks) != len(numbers):
                raise UserError(
                    f"tokenizer.path: its chat template marks {len(marks)} answers of {len(numbers)} in {what}; "
                    "needed: {% generation %} around each"
                )
            return text, marks
        asked = self._template.render([given[:number] for number in numbers], what, tools=tools, ask=True)
        so_far = self._template.render([given[: number + 1] for number in numbers], what, tools=tools)
        (text,) = self._template.render([given], what, tools=tools)
        for question, answered in zip(asked, so_far, strict=True):
            if not (text.startswith(answered) and answered.startswith(question) and len(answered) > len(question)):
                raise UserError(
                    f"tokenizer.path: its chat template renders the first turns differently where others follow, in "
                    f"{what}; needed: a template that does not, or {{% generation %}} around each answer"
                )
        return text, [
            (len(question), self._end(text, len(question), len(answered)))
            for question, answered in zip(asked, so_far, strict=True)
        ]

    def _end(self, text: str, start: int, end: int) -> int:
        """Where an answer ends: behind its last special token, where only white space follows that."""
        said = text[start:end].rstrip()
        return start + len(said) if any(said.endswith(token) for token in self._added) else end

    def _tokens(self, text: str, starts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and each token's place in the text, int64 [n, 2]; a token over the beginning of an answer is parted."""
        ids, offsets = self._piece(text, 0)
        cuts = [start for start in starts if ((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()]
        if not cuts:
            return ids, offsets
        pieces = [
            self._piece(text[first:last], first) for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True)
        ]
        return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])

    def _piece(self, text: str, place: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, dtype=np.int64).reshape(-1, 2) + place
        return np.array(found.ids, dtype=np.int64), offsets
