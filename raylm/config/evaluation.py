"""Sections about measuring and shrinking a model: ``evaluation`` and ``compression``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import Section
from raylm.config.reading import ReadingSection


class EvaluationSection(Section):
    """``evaluation``: cross-entropy over a sliding window; of a reader, exact match and F1."""

    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens a window; by default the model's positions, at most 1024."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between the starts of two windows; by default half a window. Each token is counted once."""
    batch_size: int = Field(default=8, ge=1)
    """Windows evaluated together."""
    split: Literal["train", "validation"] = "validation"
    """Which part of the data to read."""
    reading: ReadingSection = ReadingSection()
    """Of an extractive reader: how it looks for answers; sequence_length and stride above are not for it."""

    @model_validator(mode="after")
    def _stride_fits(self) -> EvaluationSection:
        if self.stride and self.sequence_length and self.stride > self.sequence_length:
            raise ValueError(f"stride: found {self.stride}, allowed: at most sequence_length ({self.sequence_length})")
        return self


class CompressionSection(Section):
    """``compression``: what to make of the model, and how to compare it."""

    method: Literal["int8"] = "int8"
    """int8: weights in 8 bits through the OpenVINO exporter."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Length of the prompts that speed is measured on."""
    new_tokens: int = Field(default=64, ge=1)
    """Tokens generated for each prompt."""
    prompts: int = Field(default=16, ge=1)
    """Prompts, taken from the validation text, on which greedy output is compared."""
