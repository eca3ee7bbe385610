"""A question and its context to windows of tokens that a reader can take, and answers to places in them.

A context that is too long for one window is read in several that overlap (Devlin et al. 2019, the authors' SQuAD code).
Places of tokens in the text come from the fast tokenizer's offsets, so that answers are exact substrings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raylm.data.padding import encoder_batch, pad_right
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """A question with a part of its context.

    Attributes:
        input_ids, token_types: int64 [T]; not padded.
        first, last: the tokens of the context, both included.
        offsets: int64 [T, 2], where each token's text begins and ends in the context; 0 outside of it.
        null: the token that stands for no answer.
    """

    input_ids: np.ndarray
    token_types: np.ndarray
    first: int
    last: int
    offsets: np.ndarray
    null: int

    def candidates(self) -> np.ndarray:
        """Which tokens an answer may begin or end at, or that stand for none, bool [T]."""
        places = np.arange(len(self.input_ids))
        return ((places >= self.first) & (places <= self.last)) | (places == self.null)

    def find(self, start: int, end: int) -> tuple[int, int]:
        """First and last token of the characters ``start`` to ``end - 1``; the null token where they are not within."""
        begins, ends = self.offsets[self.first : self.last + 1].T
        if start < begins[0] or end > ends[-1]:
            return self.null, self.null
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(begins, end, side="left")) - 1
        return self.first + first, self.first + max(first, last)


class Windows:
    """Makes windows with a model's own tokenizer.

    Args:
        tokenizer: a fast one.
        sequence_length: most tokens of a window. A question takes at most half of them; a longer one loses its end.
        overlap: tokens of the context that two windows share.
        place: where the tokenizer comes from, for the message.

    Raises:
        UserError: the tokenizer cannot say where its tokens stand.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, overlap: int, place: str = "model.path"
    ) -> None:
        check_reader_tokenizer(tokenizer, place)
        self._tokenizer, self._length, self._overlap = tokenizer, sequence_length, overlap
        self._types = "token_type_ids" in tokenizer.model_input_names
        special = tokenizer.num_special_tokens_to_add(pair=True)
        self._room = sequence_length - special
        if self._room // 2 <= overlap:
            raise UserError(
                f"overlap: found {overlap}, allowed: fewer than {self._room // 2}, as the question takes up to half of "
                f"the {self._room} tokens"
            )

    def cut(self, question: str, context: str) -> Iterator[Window]:
        """The windows of one question, at least one where the context has a token."""
        tokenizer = self._tokenizer
        # The question's ids are cut by its text, as only the tokenizer knows how to join the two.
        short = tokenizer(question.strip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if len(short["input_ids"]) > self._room // 2:
            question = question.strip()[: short["offset_mapping"][self._room // 2 - 1][1]]
        found = tokenizer(
            question.strip(), context, truncation="only_second", max_length=self._length, stride=self._overlap,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=self._types,
            padding=False, verbose=False,
        )  # fmt: skip
        for number, ids in enumerate(found["input_ids"]):
            sides = found.sequence_ids(number)
            places = [place for place, side in enumerate(sides) if side == 1]
            if not places:
                continue
            offsets = np.array(found["offset_mapping"][number], dtype=np.int64).reshape(-1, 2)
            offsets[[side != 1 for side in sides]] = 0
            types = found["token_type_ids"][number] if self._types else [0] * len(ids)
            null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            yield Window(
                np.array(ids, dtype=np.int64), np.array(types, dtype=np.int64), places[0], places[-1], offsets, null
            )


def check_reader_tokenizer(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a tokenizer that cannot say where its tokens stand.

    Raises:
        UserError: names ``place``.
    """
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"model.path: {place} has no fast tokenizer with a padding token; a reader needs one")


def pad(windows: list[Window], pad_id: int, most: int | None = None) -> dict[str, np.ndarray]:
    """Windows as one batch, padded on the right to a multiple of 8, at most to ``most`` tokens.

    Returns:
        input_ids, token_type_ids, attention_mask: int64 [n, T]; candidates: bool [n, T].
    """
    ids, types = [window.input_ids for window in windows], [window.token_types for window in windows]
    batch = encoder_batch(ids, pad_id, most, types)
    length = batch["input_ids"].shape[1]
    return {**batch, "candidates": pad_right([window.candidates() for window in windows], length, False)}
