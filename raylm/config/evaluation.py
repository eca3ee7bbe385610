"""Section about measuring a model: ``evaluation``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import LARGEST_COUNT, Count, Section
from raylm.config.reading import ReadingSection


class EvaluationSection(Section):
    """``evaluation``: how a model is measured: windows of text, or the windows of a reader, or pairs
    of texts."""

    sequence_length: int | None = Field(default=None, ge=2, le=LARGEST_COUNT)
    """Tokens of a window; by default the model's positions, at most 1024. Of pairs most tokens of a source, at most
    512 by default."""
    stride: Count | None = None
    """Tokens between the starts of two windows; by default half a window. Each token is counted once."""
    batch_size: Count = 8
    """Windows, texts or pairs in a batch."""
    beams: int = Field(default=1, ge=1, le=64)
    """Pairs: texts that a beam search follows; 1 takes the likeliest token each time."""
    new_tokens: Count | None = None
    """Pairs: most tokens that a model writes to a source; by default 128, or as many as its positions leave."""
    language: str | None = Field(default=None, pattern="^[a-z]{2,3}$")
    """Pairs: language of the targets, such as de or zh. BLEU cuts Chinese as sacrebleu's zh does and counts characters
    of Japanese, Thai, Lao, Khmer and Burmese; ROUGE counts characters of all of these. By default words."""
    split: Literal["train", "validation"] = "validation"
    """Part of the data to measure on."""
    reading: ReadingSection = ReadingSection()
    """How an extractive reader looks for answers. It does not use ``sequence_length`` and ``stride`` above."""

    @model_validator(mode="after")
    def _stride_fits(self) -> EvaluationSection:
        if self.stride and self.sequence_length and self.stride > self.sequence_length:
            raise ValueError(f"stride: found {self.stride}, allowed: at most sequence_length ({self.sequence_length})")
        return self
