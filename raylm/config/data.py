"""Sections about text and tokens: ``data`` and ``tokenizer``."""

from __future__ import annotations

import codecs
from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.augmentation import AugmentationSection
from raylm.config.base import PathText, Section, Total
from raylm.config.cleaning import CleaningSection, DecontaminationSection, DeduplicationSection

STDLIB_DOCS = "stdlib-docs"
STDLIB_PAIRS = "stdlib-pairs"


class FieldsSection(Section):
    """``data.fields``: which column of a row holds what."""

    preset: Literal["openai", "sharegpt", "alpaca"] | None = None
    """The usual form of rows. openai: conversations in ``messages`` (also without the preset). sharegpt: conversations
    in ``conversations``, with ``system`` and ``tools`` beside them. alpaca: ``instruction``, ``input`` and ``output``,
    with ``system`` and ``history`` beside them; a conversation each."""
    text: str = "text"
    """Column of a document's text. ``context`` takes the passages of SQuAD files as documents, once each, instead of
    their questions as pairs."""
    prompt: str = "prompt"
    """Column of a pair's prompt."""
    answer: str = "answer"
    """Column of a pair's answer."""
    context: str | None = None
    """Column of a passage that stands before the prompt; none by default."""
    messages: str = "messages"
    """Column of a conversation: a list of messages, each with a role and a content."""
    tools: str = "tools"
    """Column of the tools that a conversation may call, for chat templates that list them; may be missing."""
    chosen: str = "chosen"
    """Preferences: column of the answer that is preferred, a text or messages."""
    rejected: str = "rejected"
    """Preferences: column of the other answer."""
    label: str | None = None
    """Column of a document's class; none by default. The objective classification takes the column 'label' by
    default."""
    tokens: str | None = None
    """tagging: column of a sentence's words, a list; ``tokens`` by default. Of a column file (``data.format: conll``)
    the number of the column, from 1, or its name in a line ``# global.columns = ...``; the first by default."""
    tags: str | None = None
    """tagging: column of the words' tags, a list as long; ``tags`` by default. Of a column file the number of the
    column or its name; the last by default."""
    tag_names: list[str] | None = Field(default=None, min_length=1)
    """tagging: the names of tags that are numbers, that of 0 first."""

    @model_validator(mode="after")
    def _of_preset(self) -> FieldsSection:
        if self.preset == "sharegpt" and "messages" not in self.model_fields_set:
            self.messages = "conversations"
        return self


Format = Literal["auto", "text", "jsonl", "json", "csv", "parquet", "squad", "conll", "parallel", "hub", "prepared"]


class SourceSection(Section):
    """One source of a mixture."""

    path: PathText
    """Path, glob, directory, URI, hub name or embedded corpus."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each training document is used: 2 is twice, 0.5 is every second document (chosen by hash)."""
    format: Format | None = None
    """Format of this source; ``data.format`` by default."""
    target: PathText | None = None
    """Parallel text: a file whose line n translates line n of ``path``, a text file. Makes pairs."""


class DataSection(Section):
    """``data``: where text comes from.

    A source is a path, a glob, a directory made by ``raylm prepare``, a hub name (``format: hub``), or one of the
    embedded corpora: ``stdlib-docs`` (documents) and ``stdlib-pairs`` (prompt and answer).
    """

    train: PathText | list[PathText | SourceSection]
    """Source, or list of sources, to train on. A source is a name, or ``{path: ..., weight: ..., format: ...}``."""
    validation: PathText | list[PathText | SourceSection] | None = None
    """Source, or list of sources as in ``train``, to validate on; weights do not count. Without it,
    ``validation_fraction`` of the documents is held out."""
    format: Format = "auto"
    """Format of the sources; ``auto`` goes by the file's suffix. Files may be compressed: .gz .zst .xz .bz2. json: a
    list of rows, or SQuAD. squad: questions of that format, also as rows of a .json file. parallel: text files
    with a sentence, a tab and its translation on each line, without a header; makes pairs. conll: a word and its tag on
    each line, sentences parted by blank lines (tagging)."""
    fields: FieldsSection = FieldsSection()
    """Which column of a row holds what."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents that is held out, chosen by hash, if there is no ``validation`` source."""
    hub_split: str = "train"
    """Split of a hub dataset to read as training text."""
    hub_streaming: bool = False
    """Stream a hub dataset instead of downloading it first."""
    text_unit: Literal["file", "paragraph", "line"] = "file"
    """What is one document in a text file: the whole file, a paragraph (blank lines between), or a line."""
    errors: Literal["strict", "replace", "skip"] = "strict"
    """What happens to input that cannot be read. strict: stop and name the place. replace: bytes that are not UTF-8
    become U+FFFD. skip: the document, row or line is left out. The last two count what they touched."""
    encoding: str = "utf-8"
    """Encoding of text, JSONL, CSV and JSON files, such as gb18030, latin-1 or utf-16; ``detect`` guesses each file's
    own from its beginning."""
    delimiter: str | None = None
    """What parts the columns of CSV files, one character or ``tab``. By default the first of comma (.tsv: tab),
    semicolon, tab and ``|`` by which the header has the columns that ``fields`` names."""
    max_document_bytes: Total = 128 << 20
    """Longest document, line or row that is read, in bytes; ``errors`` says what happens to a longer one."""
    cleaning: CleaningSection = CleaningSection()
    """Changes to documents, and filters that drop documents; off by default."""
    deduplication: DeduplicationSection | None = None
    """Drop duplicates; off by default, ``{}`` turns it on with its defaults."""
    decontamination: DecontaminationSection | None = None
    """Drop documents that contain text of evaluation sets; off by default."""
    chat_template: str | None = None
    """Chat template that pairs and conversations are laid out with, and that the model keeps: chatml, llama3, plain, or
    a file of Jinja. By default the tokenizer's own; of one without, plain."""
    augmentation: AugmentationSection | None = None
    """Make further training documents from the existing ones; off by default."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        if encoding == "detect":
            return encoding
        try:
            name = codecs.lookup(encoding).name
            if name.startswith(("utf-16", "utf-32")):
                return name
            if "\n".encode(name) != b"\n" or name in ("utf-7", "idna", "punycode"):
                raise LookupError
        except (LookupError, UnicodeError, TypeError):
            raise ValueError(
                "allowed: detect, utf-16, utf-32, or an encoding of Python in which a line feed is one byte, such as "
                "utf-8 or gb18030"
            ) from None
        return name

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, delimiter: str | None) -> str | None:
        if delimiter in ("tab", "\\t"):
            return "\t"
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"\0'):
            raise ValueError("allowed: tab, or one character such as ';' that is no quote and no line end")
        return delimiter

    @model_validator(mode="after")
    def _not_empty(self) -> DataSection:
        if not self.train or not all(self.train_sources):
            raise ValueError("train: found no source, allowed: one or more")
        return self

    @property
    def train_sections(self) -> list[SourceSection]:
        """``train`` as a list of sections."""
        named = [self.train] if isinstance(self.train, str) else self.train
        return [SourceSection(path=source) if isinstance(source, str) else source for source in named]

    @property
    def train_sources(self) -> list[str]:
        """The names in ``train`` as a list."""
        if isinstance(self.train, str):
            return [self.train]
        return [source if isinstance(source, str) else source.path for source in self.train]

    @property
    def validation_sources(self) -> list[str | SourceSection]:
        """``validation`` as a list of names and sections, empty where a share of ``train`` is held out."""
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

    type: Literal["bpe", "wordpiece", "unigram", "byte", "character", "word"] | None = None
    """Kind of tokenizer to train: byte-level BPE, WordPiece, Unigram, single bytes, single characters, or words."""
    segmenter: Literal["whitespace", "jieba"] | None = None
    """type word: how text is cut into words, at white space and punctuation (default) or by jieba."""
    vocab_size: int | None = Field(default=None, ge=1, le=10**7)
    """Most entries of the vocabulary, special tokens included; default 8192. Not for the types byte and character."""
    path: PathText | None = None
    """Hugging Face directory or hub name of a tokenizer to reuse."""
    mask_token: bool | None = None
    """Give a new tokenizer a mask token. By default only if the same file has the objective masked, which needs it."""
    sentinels: int | None = Field(default=None, ge=0, le=10_000)
    """Sentinel tokens of a new tokenizer. By default 100 if the same file has the objective span, which needs them."""

    sample_bytes: Total = 32 << 20
    """Bytes of text that a tokenizer is trained on. From a larger set, documents are chosen by hash."""

    @property
    def special_tokens(self) -> list[str]:
        """Special tokens of a new tokenizer, in the order of their ids."""
        mask = [MASK_TOKEN] if self.mask_token else []
        return [*SPECIAL_TOKENS, *mask, *(SENTINEL_TOKEN.format(i) for i in range(self.sentinels or 0))]

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerSection:
        if self.path is not None:
            for name in ("type", "segmenter", "vocab_size", "mask_token", "sentinels"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: leave it out with path; the tokenizer at path has its own")
            return self
        self.type = self.type or "bpe"
        if self.segmenter is not None and self.type != "word":
            raise ValueError(f"segmenter: found with type {self.type}, allowed with: word")
        if self.type == "word":
            self.segmenter = self.segmenter or "whitespace"
        if self.type in ("wordpiece", "unigram", "word"):
            self.vocab_size = self.vocab_size or 8192
            least = len(self.special_tokens) + 2
            if self.vocab_size < least:
                raise ValueError(f"vocab_size: found {self.vocab_size}, allowed: {least} or more")
        elif self.type == "bpe":
            self.vocab_size = self.vocab_size or 8192
            least = BYTE_ALPHABET + len(self.special_tokens)
            if self.vocab_size < least:
                raise ValueError(
                    f"vocab_size: found {self.vocab_size}, allowed: {least} or more "
                    f"({BYTE_ALPHABET} bytes and {len(self.special_tokens)} special tokens)"
                )
        elif self.vocab_size is not None:
            raise ValueError(f"vocab_size: found with type {self.type}, allowed with: bpe, wordpiece, unigram, word")
        return self
