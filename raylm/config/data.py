"""Sections about text and tokens: ``data`` and ``tokenizer``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import Section

STDLIB_DOCS = "stdlib-docs"
STDLIB_PAIRS = "stdlib-pairs"


class FieldsSection(Section):
    """``data.fields``: which column of a row holds what."""

    text: str = "text"
    """Column of a document's text."""
    prompt: str = "prompt"
    """Column of a pair's prompt."""
    answer: str = "answer"
    """Column of a pair's answer."""
    context: str | None = None
    """Column of a passage that stands before the prompt; none by default."""


class DataSection(Section):
    """``data``: where text comes from.

    A source is a path, a glob, a directory made by ``raylm prepare``, a hub name (``format: hub``), or one of the
    embedded corpora: ``stdlib-docs`` (documents) and ``stdlib-pairs`` (prompt and answer).
    """

    train: str | list[str]
    """Source, or list of sources, to train on."""
    validation: str | list[str] | None = None
    """Source, or list of sources, to validate on; without it a share of the documents is held out by their hash."""
    format: Literal["auto", "text", "jsonl", "csv", "parquet", "hub", "prepared"] = "auto"
    """Format of the sources; ``auto`` goes by the file's suffix."""
    fields: FieldsSection = FieldsSection()
    """Which column of a row holds what."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents that is held out where no ``validation`` source is given."""
    hub_split: str = "train"
    """Split of a hub dataset to read as training text."""
    text_unit: Literal["file", "paragraph", "line"] = "file"
    """What is one document in a text file: the whole file, a paragraph (blank lines between), or a line."""

    @model_validator(mode="after")
    def _not_empty(self) -> DataSection:
        if not self.train or not all(self.train_sources):
            raise ValueError("train must name at least one source")
        return self

    @property
    def train_sources(self) -> list[str]:
        """``train`` as a list."""
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @property
    def validation_sources(self) -> list[str]:
        """``validation`` as a list, empty where a share of ``train`` is held out."""
        if self.validation is None:
            return []
        return [self.validation] if isinstance(self.validation, str) else list(self.validation)


SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>")
MASK_TOKEN = "<|mask|>"
# T5's own names, by which its sentinels are found in any tokenizer.
SENTINEL_TOKEN = "<extra_id_{}>"
BYTE_ALPHABET = 256


class TokenizerSection(Section):
    """``tokenizer``: train one of a ``type``, or take the one at ``path``."""

    type: Literal["bpe", "byte", "character"] | None = None
    """Kind of tokenizer to train: byte-level BPE, single bytes, or single characters."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Entries of a BPE vocabulary, special tokens included; default 8192. The other types find theirs."""
    path: str | None = None
    """Hugging Face directory or hub name of a tokenizer to reuse."""
    mask_token: bool | None = None
    """Give a new tokenizer a mask token, which the objective masked needs; by default where the file has it."""
    sentinels: int | None = Field(default=None, ge=0)
    """Sentinel tokens of a new tokenizer, for the objective span; by default 100 where the file has it, else none."""

    @property
    def special_tokens(self) -> list[str]:
        """Special tokens of a new tokenizer, in the order of their ids."""
        mask = [MASK_TOKEN] if self.mask_token else []
        return [*SPECIAL_TOKENS, *mask, *(SENTINEL_TOKEN.format(i) for i in range(self.sentinels or 0))]

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerSection:
        if self.path is not None:
            for name in ("type", "vocab_size", "mask_token", "sentinels"):
                if getattr(self, name) is not None:
                    raise ValueError(f"path stands alone: leave out {name}")
            return self
        self.type = self.type or "bpe"
        if self.type == "bpe":
            self.vocab_size = self.vocab_size or 8192
            least = BYTE_ALPHABET + len(self.special_tokens)
            if self.vocab_size < least:
                raise ValueError(
                    f"vocab_size {self.vocab_size} is smaller than the byte alphabet: allowed is {least} or more "
                    f"({BYTE_ALPHABET} bytes and {len(self.special_tokens)} special tokens)"
                )
        elif self.vocab_size is not None:
            raise ValueError(f"vocab_size is for type bpe; a {self.type} tokenizer finds its own")
        return self
