"""Texts and pairs to token ids, with the tokenizer directory that a prepared set keeps.

Text is encoded as text: what looks like a special token in a document stays ordinary characters, so that only
``prepare`` itself writes end-of-text tokens. Pairs are laid out by the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from raylm.data.chat import neutralize, pair_messages, question_messages
from raylm.data.sources.documents import Document
from raylm.data.tokens.templates import ChatTemplate
from raylm.data.tokens.word_encoding import WordEncoder, applies_to
from raylm.errors import UserError


class DocumentEncoder:
    """Encodes documents with the tokenizer of a directory; needs no transformers.

    Args:
        directory: Hugging Face directory with ``tokenizer.json``.
        eos_id: id that ends each document.
    """

    def __init__(self, directory: Path, eos_id: int) -> None:
        self._tokenizer = load_backend(directory)
        self._tokenizer.encode_special_tokens = True
        self._eos_id = eos_id
        self._by_words = WordEncoder(self._tokenizer, eos_id) if applies_to(self._tokenizer) else None

    def encode(self, documents: Sequence[Document]) -> tuple[list[np.ndarray], np.ndarray]:
        """Tokens of each document, its end-of-text token last, and an empty array [n, 0] of further columns."""
        if self._by_words is not None:
            tokens = self._by_words.encode([document.text for document in documents])
            return tokens, np.empty((len(tokens), 0), dtype=np.int64)
        encodings = self._tokenizer.encode_batch_fast(
            [document.text for document in documents], add_special_tokens=False
        )
        tokens = [np.array([*encoding.ids, self._eos_id], dtype=np.int64) for encoding in encodings]
        return tokens, np.empty((len(tokens), 0), dtype=np.int64)


class PairEncoder:
    """Lays out prompt/answer pairs with the chat template of a tokenizer directory.

    The prompt is encoded exactly as a server encodes it before generation; the rest of the template follows. What reads
    as a special token inside a prompt, a context or an answer is neutralized first.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_backend(directory)
        self._template = ChatTemplate(directory, self._tokenizer)

    def encode(self, documents: Sequence[Document]) -> tuple[list[np.ndarray], np.ndarray]:
        """Tokens of each pair, and int64 [n, 3]: where the answer begins, where the part that may be cut begins, ends.

        Raises:
            UserError: the template does not go on from its own generation prompt.
        """
        parts = [
            tuple(
                neutralize(part, self._template.special)
                for part in (document.prompt, document.answer, document.context)
            )
            for document in documents
        ]
        what = "a question and an answer"
        asked = self._template.render(
            [question_messages(prompt, context) for prompt, _, context in parts], what, ask=True
        )
        whole = self._template.render([pair_messages(*part) for part in parts], what)
        answers = []
        for question, conversation in zip(asked, whole, strict=True):
            if not conversation.startswith(question) or len(conversation) == len(question):
                raise UserError(
                    "tokenizer.path: its chat template does not write an answer after its own generation prompt; "
                    "a tokenizer with a plain template is needed for pairs"
                )
            answers.append(conversation[len(question) :])
        prompt_encodings = self._tokenizer.encode_batch(asked, add_special_tokens=False)
        answer_encodings = self._tokenizer.encode_batch_fast(answers, add_special_tokens=False)
        tokens, columns = [], []
        for (prompt, _, context), question, before, after in zip(
            parts, asked, prompt_encodings, answer_encodings, strict=True
        ):
            tokens.append(np.array([*before.ids, *after.ids], dtype=np.int64))
            columns.append((len(before.ids), *_token_span(before, question, context or prompt)))
        return tokens, np.array(columns, dtype=np.int64).reshape(len(tokens), 3)


def _token_span(encoding: Encoding, text: str, part: str) -> tuple[int, int]:
    """The tokens of ``encoding`` (of ``text``) that lie wholly inside ``part``; (0, 0) where it is not found."""
    first = text.find(part.strip())
    if first < 0:
        return 0, 0
    last = first + len(part.strip())
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.flatnonzero((offsets[:, 0] >= first) & (offsets[:, 1] <= last))
    return (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)


def load_backend(directory: Path) -> Tokenizer:
    """The directory's tokenizer, without what would cut or pad."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
