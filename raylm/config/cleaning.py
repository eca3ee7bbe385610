"""Sections about what happens to documents before they are tokenized: ``cleaning``, ``deduplication``,
``decontamination``. Everything is off until it is named."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import Count, CountFromZero, PathText, Section, Seed


class LengthSection(Section):
    """``cleaning.length``: documents outside of these bounds are dropped."""

    min_characters: CountFromZero = 1
    """Fewest characters."""
    max_characters: Count | None = None
    """Most characters; no limit by default."""
    min_words: CountFromZero = 0
    """Fewest words; a Chinese or Japanese character counts as one."""
    max_words: Count | None = None
    """Most words; no limit by default."""

    @model_validator(mode="after")
    def _ordered(self) -> LengthSection:
        for unit in ("characters", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most is not None and most < least:
                raise ValueError(f"max_{unit}: found {most}, allowed: min_{unit} ({least}) or more")
        return self


class LanguageSection(Section):
    """``cleaning.language``: keep documents in some languages."""

    keep: list[str] = Field(min_length=1)
    """ISO 639-1 codes, such as en and zh; zh stands for Wu and Cantonese too, which are hard to tell from it."""
    characters: int = Field(default=1000, ge=50, le=10**6)
    """Characters at the beginning of a document that its language is found from."""


class CleaningSection(Section):
    """``data.cleaning``: what is changed in a document, and which documents are dropped.

    Changes come first, in this order: html, unicode, control_characters, full_width, chinese, pii. Then the filters, in
    the order below. The report counts and shows what each of them touched.
    """

    html: bool = False
    """Replace HTML by its text."""
    unicode: Literal["NFC", "NFKC"] | None = None
    """Unicode normalisation form."""
    control_characters: bool = False
    """Remove control and zero-width characters other than tab and line feed; line ends become line feeds."""
    full_width: bool = False
    """Make full-width letters, digits and spaces half-width; Chinese punctuation stays."""
    chinese: Literal["simplified", "traditional"] | None = None
    """Convert Chinese characters (OpenCC; the extra ``chinese``)."""
    pii: list[Literal["email", "ip", "phone"]] = Field(default_factory=list)
    """Personal data to mask, as <email>, <ip>, <phone>."""
    length: LengthSection | None = None
    """Bounds of a document's length."""
    language: LanguageSection | None = None
    """Languages to keep."""
    repetition: bool = False
    """Drop documents that repeat themselves: the rules of Gopher (Rae et al. 2021, table A1). Of a pair the answer is
    judged, from 50 words on."""
    gopher: bool = False
    """Drop documents that are not prose: the quality rules of Gopher (Rae et al. 2021, section A.1.1). For English."""
    c4: bool = False
    """Keep only lines that end like sentences, and drop documents with placeholder text: the rules of C4 (Raffel et al.
    2020). For English."""


class DeduplicationSection(Section):
    """``data.deduplication``: drop duplicates over all sources together; the first one stays."""

    exact: bool = True
    """Drop documents whose text is the same but for letter case, white space and Unicode form."""
    near: bool = True
    """Drop documents that share most of their shingles (runs of words) with an earlier one (MinHash,
    locality-sensitive hashing). A pair is near to pairs with the same context only, by its prompt and answer."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """Least Jaccard similarity of the shingles of two documents at which the later document is dropped."""
    shingle_words: int = Field(default=5, ge=1, le=32)
    """Words of a shingle; a Chinese or Japanese character is a word."""
    permutations: int = Field(default=128, ge=8, le=1024)
    """Length of a MinHash signature."""
    bands: Count | None = None
    """Bands that a signature is cut into; the default finds 99% of the pairs at ``threshold``."""
    seed: Seed = 1
    """Seed of the permutations."""

    @model_validator(mode="after")
    def _bands(self) -> DeduplicationSection:
        if self.bands is not None and self.bands > self.permutations:
            raise ValueError(f"bands: found {self.bands}, allowed: at most permutations ({self.permutations})")
        return self

    @property
    def layout(self) -> tuple[int, int]:
        """(bands, rows a band).

        A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman & Ullman,
        Mining of Massive Datasets, 3.4.2). The longest bands that keep this at 0.99 for s = ``threshold`` give the
        fewest candidates.
        """
        if self.bands is not None:
            return self.bands, self.permutations // self.bands
        for rows in range(self.permutations, 1, -1):
            bands = self.permutations // rows
            if 1 - (1 - self.threshold**rows) ** bands >= 0.99:
                return bands, rows
        return self.permutations, 1


class DecontaminationSection(Section):
    """``data.decontamination``: drop documents that contain text of evaluation sets."""

    sources: list[PathText] = Field(min_length=1)
    """Evaluation sets: sources like those of ``data.train``."""
    ngram_words: int = Field(default=13, ge=1, le=64)
    """Words of an n-gram; 13 as for GPT-3 (Brown et al. 2020, appendix C)."""
    max_overlap: float = Field(default=0.0, ge=0, lt=1)
    """Share of a document's n-grams that may occur in the evaluation sets."""
