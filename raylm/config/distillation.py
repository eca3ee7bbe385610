"""Section about learning from a teacher: ``distillation``, in training stages and in steps of ``compress``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from raylm.config.base import Count, CountFromZero, PathText, Section

Share = Annotated[float, Field(ge=0, le=1e6)]


class DistillationSection(Section):
    """``distillation``: a teacher, whose outputs the model learns beside the data's own targets."""

    teacher: PathText | None = None
    """Hugging Face directory, run directory or hub name of the teacher, which has the same tokenizer. In a step of
    ``compress`` the original model by default."""
    temperature: float = Field(default=1.0, gt=0, le=1e3)
    """Softens the distributions that are compared (Hinton et al. 2015, arXiv:1503.02531)."""
    logits: Share = 1.0
    """Weight of the divergence between the teacher's distribution and the model's."""
    targets: Share = 0.0
    """Weight of the loss on the data's own targets."""
    hidden: Share = 0.0
    """Weight of the distance between hidden states of layers (DistilBERT, TinyBERT)."""
    attention: Share = 0.0
    """Weight of the distance between attention probabilities of layers (TinyBERT, arXiv:1909.10351)."""
    top_k: int | None = Field(default=None, ge=1, le=4096)
    """Ask the teacher once, before training, on Ray Data, and keep so many of its likeliest choices for each target in
    the run directory, by sample number. By default it computes beside the model, on every worker."""
    layer_map: list[CountFromZero] | None = Field(default=None, min_length=1)
    """For each layer of the model, the teacher's layer that it learns from, from 0; by default evenly spread, the last
    from the last."""

    @model_validator(mode="after")
    def _something(self) -> DistillationSection:
        if not any((self.logits, self.targets, self.hidden, self.attention)):
            raise ValueError("found no weight above 0, allowed: one or more of logits, targets, hidden and attention")
        if self.top_k is not None and (not self.logits or self.hidden or self.attention):
            raise ValueError(
                f"top_k: found {self.top_k}, allowed with logits above 0 and without hidden and attention, for which "
                "the teacher must be there"
            )
        if self.layer_map is not None and not (self.hidden or self.attention):
            raise ValueError("layer_map: leave it out, or give hidden or attention a weight")
        return self


class StudentSection(Section):
    """``student``: the smaller model that learns; by default the model as the steps before made it."""

    layers: Count | None = None
    """So many of the teacher's layers, evenly spread, the first and the last among them."""
    keep_layers: list[CountFromZero] | None = Field(default=None, min_length=1)
    """Numbers of the teacher's layers that it begins with, from 0."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of the configuration that differ from the teacher's; weights whose shape differs are drawn anew."""
    path: PathText | None = None
    """An existing model with the same tokenizer."""

    @model_validator(mode="after")
    def _one(self) -> StudentSection:
        if self.layers is not None and self.keep_layers is not None:
            raise ValueError("keep_layers: leave it out with layers")
        if self.path is not None and (self.layers is not None or self.keep_layers is not None or self.config):
            raise ValueError("path: leave it out with layers, keep_layers and config")
        return self


class SequencesSection(Section):
    """``sequences``: texts that the teacher writes, on which the student is trained (Kim and Rush 2016)."""

    prompts: Count = 256
    """Beginnings, taken from the training text."""
    prompt_tokens: Count = 32
    """Tokens of a beginning."""
    new_tokens: Count = 128
    """Tokens that the teacher goes on with."""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """Of the teacher's sampling; 0 takes the most likely token."""
