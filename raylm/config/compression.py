"""Section about shrinking a model: ``compression``. Another method is a section and a key of :class:`StepSection` here,
and ``raylm/compression/methods/KEY.py``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raylm.config.base import Count, Section


class QuantizeSection(Section):
    """``compression.steps: [{quantize: ...}]``: fewer bits for each weight."""

    bits: Literal[8] = 8
    """Bits of a weight in the export for OpenVINO."""


class StepSection(Section):
    """One of ``compression.steps``: a method by its name."""

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


class CompressionSection(Section):
    """``compression``: how to compress the model, and how to compare it with the original."""

    steps: list[StepSection] = Field(default_factory=lambda: [StepSection(quantize=QuantizeSection())], min_length=1)
    """Methods, applied in this order."""
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
    def _each_once(self) -> CompressionSection:
        names = [step.chosen[0] for step in self.steps]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"steps: found {twice} {names.count(twice)} times, allowed: once")
        return self
