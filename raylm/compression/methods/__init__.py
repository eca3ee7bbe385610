"""The compression methods: a module each, named as its key of ``compression.steps``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylm.compression.methods.base import Method, Outlook
from raylm.config.base import Section
from raylm.config.recovery import RecoverySection
from raylm.config.stages import CompressConfig
from raylm.config.training import TrainingSection
from raylm.errors import UserError
from raylm.models.heads import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Step:
    """One step of a ``compression`` section.

    Attributes:
        number: from 1.
        name: of the method.
    """

    number: int
    name: str
    method: Method
    section: Section

    @property
    def folder(self) -> str:
        """Its directory's name."""
        return f"{self.number:02}-{self.name}"

    def describe(self) -> str:
        """What it makes, in a few words."""
        return self.method.describe(self.section)


@dataclass(frozen=True)
class Steps:
    """The steps of a ``compression`` section, in order.

    Attributes:
        run: the file.
    """

    run: CompressConfig

    def __iter__(self) -> Iterator[Step]:
        for number, step in enumerate(self.run.compression.steps, 1):
            name, section = step.chosen
            method = importlib.import_module(f"raylm.compression.methods.{name}").METHOD
            yield Step(number, name, method, section)

    def check(self, config: PretrainedConfig, head: Head) -> PretrainedConfig:
        """Refuse what a step cannot do.

        Returns:
            the configuration of the model that comes out.

        Raises:
            UserError: one line.
        """
        original = config
        for step in self:
            if config.vocab_size != original.vocab_size and step.method.needs_material(step.section):
                raise UserError(
                    f"compression.steps[{step.number - 1}]: found {step.name} with samples or training behind "
                    "prune.vocabulary, allowed: before it, as the samples are of the original's tokens"
                )
            config = step.method.check(step.section, Outlook(config, original, head, self.run))
        return config

    @property
    def need_material(self) -> bool:
        """Whether any step reads training samples."""
        return any(step.method.needs_material(step.section) for step in self)

    @property
    def trainings(self) -> list[TrainingSection]:
        """The training of all steps."""
        sections = [step.section for step in self]
        found = [one if isinstance(one, RecoverySection) else getattr(one, "recovery", None) for one in sections]
        return [one.training for one in found if one is not None]

    def describe(self) -> str:
        """What comes out, in a few words."""
        return ", ".join(step.describe() for step in self)
