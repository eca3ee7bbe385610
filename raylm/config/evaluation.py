"""Section about measuring a model: ``evaluation``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import LARGEST_COUNT, Count, Section
from raylm.config.reading import ReadingSection


class EvaluationSection(Section):
    """``evaluation``: how a model is measured: windows of text, or the windows of a reader."""

    sequence_length: int | None = Field(default=None, ge=2, le=LARGEST_COUNT)
    """Tokens of a window; by default the model's positions, at most 1024."""
    stride: Count | None = None
    """Tokens between the starts of two windows; by default half a window. Each token is counted once."""
    batch_size: Count = 8
    """Windows in a batch."""
    split: Literal["train", "validation"] = "validation"
    """Part of the data to measure on."""
    reading: ReadingSection = ReadingSection()
    """How an extractive reader looks for answers. It does not use ``sequence_length`` and ``stride`` above."""

    @model_validator(mode="after")
    def _stride_fits(self) -> EvaluationSection:
        if self.stride and self.sequence_length and self.stride > self.sequence_length:
            raise ValueError(f"stride: found {self.stride}, allowed: at most sequence_length ({self.sequence_length})")
        return self
