"""Token ids to text piece by piece: no piece splits a character, and none goes past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a tokenizer writes for bytes that are no character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Ids that are decoded again with each further one, while the end of a character is awaited; bytes that never become one
# would cost the square of their number.
MOST_UNSETTLED = 32
# A character has four bytes at most, and there may be ids without text between them.
MOST_OF_CHARACTER = 8


class IncrementalDecoder:
    """Decodes a growing list of ids, and gives out only text that later ids cannot change.

    Text up to the last place where all characters were complete is settled. What follows is decoded together with
    the settled piece before it, as some tokenizers treat the start of a text in their own way (the leading space of
    SentencePiece).

    Args:
        tokenizer: of the ids.
        skip_special: leave special tokens out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        # ids[:_settled] are settled; decoding starts at _context; _ahead characters after the settled ones are out.
        self._context = self._settled = self._ahead = 0

    def push(self, ids: Sequence[int]) -> str:
        """Take ``ids`` and return the text that is certain now, perhaps none."""
        self._ids += ids
        text = self._unsettled()
        certain = text.rstrip(REPLACEMENT)
        if len(certain) == len(text):
            return self._settle(text)
        piece = certain[self._ahead :]
        self._ahead = max(self._ahead, len(certain))
        return piece + (self._settle_most(text) if len(self._ids) - self._settled > MOST_UNSETTLED else "")

    def finish(self) -> str:
        """What is left at the end, with replacement characters for incomplete ones."""
        return self._settle(self._unsettled())

    def _settle_most(self, text: str) -> str:
        """Settle all but the beginning of a last character; everything where no such beginning is found."""
        for end in range(len(self._ids) - 1, len(self._ids) - 1 - MOST_OF_CHARACTER, -1):
            shorter = self._unsettled(end)
            if shorter and not shorter.endswith(REPLACEMENT):
                # What of it is text is out already.
                self._context, self._settled = self._settled, end
                self._ahead = max(0, self._ahead - len(shorter))
                return ""
        return self._settle(text)

    def _unsettled(self, end: int | None = None) -> str:
        settled = self._decode(self._ids[self._context : self._settled])
        return self._decode(self._ids[self._context : end])[len(settled) :]

    def _settle(self, text: str) -> str:
        piece = text[self._ahead :]
        if text:
            # Ids without text (special tokens) are no context that would show how the next piece starts.
            self._context = self._settled
        self._settled, self._ahead = len(self._ids), 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False)


class StopStrings:
    """Cuts a growing text at the first of ``strings``; holds back what may be the start of one.

    Attributes:
        found: the string that the text was cut at, else empty.

    Args:
        strings: empty ones are none.
        include: cut behind the string.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = [string for string in strings if string]
        self._include = include
        self._held = ""
        self.found = ""

    def push(self, text: str, *, early: bool = False) -> str:
        """Take ``text`` and return what certainly stands before any stop string.

        Args:
            early: the text may not end here: a string that is whole by now is none.
        """
        self._held += text
        places = [(place, string) for string in self._strings if (place := self._held.find(string)) >= 0]
        if places and not early:
            place, self.found = min(places)
            return self._take(place + len(self.found) * self._include)
        return self._take(len(self._held) - self._possible_start())

    def finish(self) -> str:
        """What was held back for nothing."""
        return self._take(len(self._held))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._strings):
                return length
        return 0
