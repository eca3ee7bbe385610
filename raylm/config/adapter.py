"""Sections about what of a model is trained: ``adapter`` and ``freezing``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import Count, CountFromZero, Section

ALL_LINEAR = "all_linear"


class AdapterSection(Section):
    """``adapter``: train small matrices beside the model's own, which stay as they are."""

    type: Literal["lora", "dora"] = "lora"
    """lora adds the product of two small matrices to a layer's weights (arXiv:2106.09685); dora trains the length of
    each row of the sum too (arXiv:2402.09353)."""
    rank: Count = 16
    """Rows of the one small matrix, columns of the other."""
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    """The product counts alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs that the adapters do not see in training."""
    targets: str | list[str] = ALL_LINEAR
    """Layers that get adapters: all_linear (but the output's), or the ends of their names, such as [q_proj, v_proj]."""
    rank_stabilized: bool = False
    """The product counts alpha / sqrt(rank) times, so that a larger rank learns more (arXiv:2312.03732)."""
    bits: Literal[4] | None = None
    """4 keeps the linear layers' own weights in 4 bits while adapters are trained beside them, in about a quarter of
    bf16's memory (NF4 with double quantization: QLoRA, arXiv:2305.14314); needs the extra qlora. By default they are in
    the type that training computes in."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | list[str]) -> str | list[str]:
        if targets != ALL_LINEAR and (isinstance(targets, str) or not all(targets) or not targets):
            raise ValueError(f"allowed: {ALL_LINEAR}, or a list of ends of names")
        return targets

    @property
    def scale(self) -> float:
        """How often the product counts."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class FreezingSection(Section):
    """``freezing``: train some of the weights, or the lower ones more slowly."""

    train: list[str] | None = None
    """Patterns of names such as ``*.norm.weight``; parameters that fit none are not trained."""
    layers: CountFromZero | None = None
    """So many of the lowest blocks are not trained, nor are the embeddings below them."""
    unfreeze_every_steps: Count | None = None
    """Train what stands above the blocks first; every so many steps the next block below, the embeddings last (gradual
    unfreezing, arXiv:1801.06146)."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Learning rate of a block, as a share of that of the block above it (arXiv:2003.10555)."""

    @model_validator(mode="after")
    def _says_something(self) -> FreezingSection:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("found nothing, allowed: train, layers, unfreeze_every_steps, layer_decay")
        if self.train is not None and not self.train:
            raise ValueError("train: found no pattern, allowed: one or more")
        return self
