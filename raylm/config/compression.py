"""Section about shrinking a model: ``compression``. Another method is a section and a key of :class:`StepSection` here,
and ``raylm/compression/methods/KEY.py``."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from raylm.config.base import Count, Section
from raylm.config.data import DataSection
from raylm.config.distillation import SequencesSection, StudentSection
from raylm.config.pruning import PruneSection
from raylm.config.quantization import QuantizeSection
from raylm.config.recovery import RecoverySection


class DistillSection(RecoverySection):
    """``compression.steps: [{distill: ...}]``: a smaller model learns what the teacher says."""

    student: StudentSection = StudentSection()
    """The model that learns."""
    sequences: SequencesSection | None = None
    """Train on texts that the teacher writes, instead of the training text."""


class StepSection(Section):
    """One of ``compression.steps``: a method by its name."""

    distill: DistillSection | None = None
    """A smaller model learns from the original."""
    prune: PruneSection | None = None
    """Fewer layers, heads, neurons or weights."""
    quantize: QuantizeSection | None = None
    """Fewer bits for each weight."""

    @model_validator(mode="after")
    def _one(self) -> StepSection:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"found {found}, allowed: one method, of {', '.join(type(self).model_fields)}")
        return self

    @property
    def chosen(self) -> tuple[str, Section]:
        """The method's name and its section."""
        return next((name, found) for name in type(self).model_fields if (found := getattr(self, name)) is not None)


class TargetSection(Section):
    """``compression.target``: what a model has to keep to."""

    megabytes: float | None = Field(default=None, gt=0, le=1e9)
    """Weights on disk."""
    p50_milliseconds: float | None = Field(default=None, gt=0, le=1e9)
    """Median time of a token of one answer, or of one text."""

    @model_validator(mode="after")
    def _something(self) -> TargetSection:
        if self.megabytes is None and self.p50_milliseconds is None:
            raise ValueError("found nothing, allowed: megabytes, p50_milliseconds, or both")
        return self


class CompressionSection(Section):
    """``compression``: how to compress the model, and how to compare it with the original."""

    steps: list[StepSection] = Field(default_factory=lambda: [StepSection(quantize=QuantizeSection())], min_length=1)
    """Methods, applied in this order."""
    target: TargetSection | None = None
    """tune: takes the best model that keeps to it. compress: a chain that cannot keep to its size is refused."""
    outside: DataSection | None = None
    """Other data that quality is measured on as well, to see what is lost outside of the domain of ``data``."""
    text_tokens: Count | None = 16384
    """Tokens of each text that a text generator's quality is measured on, in parts spread over the text; null: all."""
    prompt_tokens: Count = 32
    """Tokens of a prompt when speed is measured."""
    new_tokens: Count = 64
    """Tokens generated for each prompt when speed is measured."""
    prompts: Count = 16
    """Number of prompts, taken from the validation text, whose greedy output is compared."""

    @model_validator(mode="before")
    @classmethod
    def _of_version_0_2(cls, values: Any) -> Any:
        # Its one method, which stands in the config.yaml of runs that are done.
        if isinstance(values, dict) and values.get("method") == "int8" and "steps" not in values:
            rest = {key: value for key, value in values.items() if key != "method"}
            return {**rest, "steps": [{"quantize": {"bits": 8}}]}
        return values

    @model_validator(mode="after")
    def _quantized_last(self) -> CompressionSection:
        names = [step.chosen[0] for step in self.steps]
        if (count := names.count("quantize")) > 1:
            raise ValueError(f"steps: found quantize {count} times, allowed: once")
        if "quantize" in names[:-1]:
            after = names[names.index("quantize") + 1]
            raise ValueError(
                f"steps: found {after} after quantize, allowed: quantize as the last, as it rounds weights"
            )
        return self
