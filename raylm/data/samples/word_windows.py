"""Sentences, given as words, to windows of a model's tokens.

Each word is cut into sub-words by itself; the first of them stands for the word. A sentence that is too long for one
window is read in several, which part between words: every word is in exactly one of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sentences that are tokenized together.
TOGETHER = 512


@dataclass(frozen=True)
class WordWindow:
    """Some words of a sentence as tokens.

    Attributes:
        ids: int64 [T], special tokens included.
        firsts: int64 [words], the place of each word's first sub-word in ``ids``.
        start: number of the first of the words in the sentence.
    """

    ids: np.ndarray
    firsts: np.ndarray
    start: int


class WordWindows:
    """Makes windows with a model's own tokenizer.

    Args:
        tokenizer: a fast one.
        length: most tokens of a window. A word that is longer than that by itself loses its end.
        place: where the tokenizer comes from, for the message.

    Raises:
        UserError: the tokenizer cannot say which words its tokens are of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, place: str = "model.path") -> None:
        check_word_tokenizer(tokenizer, place)
        self._tokenizer = tokenizer
        self._lead = " " if _wants_space(tokenizer) else ""
        # What the tokenizer puts around a text.
        around = tokenizer("a", verbose=False)["input_ids"]
        bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        before = next(n for n in range(len(around)) if around[n : n + len(bare)] == bare)
        self._before, self._after = around[:before], around[before + len(bare) :]
        self._room = length - len(self._before) - len(self._after)
        # For a word that the tokenizer drops, as one of control characters.
        self._unknown = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id

    def cut(self, sentences: Sequence[Sequence[str]]) -> list[list[WordWindow]]:
        """The windows of each sentence, at least one where it has a word."""
        found: list[list[WordWindow]] = []
        for begin in range(0, len(sentences), TOGETHER):
            batch = [[f"{self._lead}{word}" for word in words] for words in sentences[begin : begin + TOGETHER]]
            encoded = self._tokenizer(batch, is_split_into_words=True, add_special_tokens=False, verbose=False)
            for number, words in enumerate(batch):
                pieces: list[list[int]] = [[] for _ in words]
                for token, word in zip(encoded["input_ids"][number], encoded.word_ids(number), strict=True):
                    pieces[word].append(token)
                found.append(self._pack(pieces))
        return found

    def _pack(self, pieces: list[list[int]]) -> list[WordWindow]:
        """As many words into each window as there is room for."""
        windows: list[WordWindow] = []
        ids, firsts, start = list(self._before), [], 0

        def close() -> None:
            whole = np.array([*ids, *self._after], dtype=np.int64)
            windows.append(WordWindow(whole, np.array(firsts, dtype=np.int64), start))

        for number, piece in enumerate(pieces):
            kept = piece[: self._room] or [self._unknown]
            if firsts and len(ids) - len(self._before) + len(kept) > self._room:
                close()
                ids, firsts, start = list(self._before), [], number
            firsts.append(len(ids))
            ids += kept
        if firsts:
            close()
        return windows


def check_word_tokenizer(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a tokenizer that cannot say which words its tokens are of.

    Raises:
        UserError: names ``place``.
    """
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"model.path: {place} has no fast tokenizer with a padding token; a tagger needs one")


def _wants_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word is known by the space before it, which the tokenizer does not add itself (GPT-2, RoBERTa)."""
    step = tokenizer.backend_tokenizer.pre_tokenizer
    # Its state is its part of tokenizer.json: the vocabulary would take long to write.
    steps = {} if step is None else json.loads(step.__getstate__())
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    return any(step.get("type") == "ByteLevel" and not step["add_prefix_space"] for step in steps)
