"""Sections about bits: ``quantize`` of ``compression.steps``, and training that knows of the rounding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raylm.config.base import Count, Section
from raylm.config.recovery import RecoverySection


class RoundingSection(Section):
    """``rounding``: train with weights that are rounded to 4 bits, as an export for OpenVINO rounds them (QAT)."""

    group_size: Literal[32, 64, 128] = 64
    """Weights that share a scale; they divide every matrix's inputs."""


class QuantizeSection(Section):
    """``compression.steps: [{quantize: ...}]``: fewer bits for each weight."""

    bits: Literal[8, 4] = 8
    """Bits of a weight in the export for OpenVINO: 8 with a scale for each output, 4 with one for each group."""
    group_size: Literal[32, 64, 128] = 64
    """4 bits: weights that share a scale; they divide every matrix's inputs."""
    method: Literal[
        "auto", "data_free", "awq", "gptq", "scale_estimation", "awq_scale_estimation", "gptq_scale_estimation",
        "awq_gptq", "keep",
    ] = "auto"  # fmt: skip
    """4 bits: data_free rounds to the nearest. awq (arXiv:2306.00978), gptq (arXiv:2210.17323) and scale_estimation
    look at activations of the training text. auto: data_free for 8 bits; for 4 bits all of them, of which the best on
    held-out training text is taken. keep: the weights have 16 values a group of 32 already (a Q4_1 GGUF), and keep
    them."""
    megabytes: float | None = Field(default=None, gt=0, le=1e9)
    """4 bits: weights on disk that are allowed. Matrices that suffer most from 4 bits have 8, as many as fit."""
    activations: Literal["float", "int8"] = "float"
    """int8: activations of matrix products are rounded too, after their outliers were moved into the weights
    (SmoothQuant, arXiv:2211.10438)."""
    cache_bits: Literal[8, 16, 32] = 32
    """Bits of keys and values in the cache of a text generator."""
    samples: Count = 64
    """Sequences of training text that activations are measured on."""
    sequence_length: Count = 256
    """Tokens of such a sequence."""
    recovery: RecoverySection | None = None
    """4 bits: training beforehand in which weights are rounded as the export rounds them (QAT)."""

    @model_validator(mode="after")
    def _four_bits(self) -> QuantizeSection:
        if self.method == "keep" and (self.group_size != 32 or self.megabytes or self.recovery is not None):
            raise ValueError("method: found keep, allowed with group_size 32, without megabytes and recovery")
        if self.bits == 4:
            return self
        if self.method not in ("auto", "data_free"):
            raise ValueError(f"method: found {self.method}, allowed with bits 8: auto, data_free")
        for name in ("megabytes", "recovery"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: allowed with bits 4 only")
        return self
