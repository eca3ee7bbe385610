"""What every compression method gives, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raylm.config.base import Section
from raylm.config.recovery import RecoverySection
from raylm.config.stages import CompressConfig
from raylm.models.heads import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.compression.material import Material


@dataclass(frozen=True)
class Outlook:
    """What a step will begin with, as far as configurations tell.

    Attributes:
        config: of the model after the steps before.
        original: of the model that the run begins with.
        head: of both.
        run: the whole file.
    """

    config: PretrainedConfig
    original: PretrainedConfig
    head: Head
    run: CompressConfig


@dataclass
class Candidate:
    """The model on its way to a smaller one.

    Attributes:
        directory: its Hugging Face directory, which nobody changes.
        original: that of the model which the run began with.
        head: of the model.
        material: the run's data as training samples.
        export: folder of what an engine runs of it, where a step has made that.
    """

    directory: Path
    original: Path
    head: Head
    material: Material
    export: Path | None = None


@dataclass(frozen=True)
class Recovery:
    """Training after a method was applied.

    Attributes:
        section: how long, and from what the model learns.
        keys: what the training's configuration has beside that, section by section.
        data: keys of ``data``, to train on instead of the run's.
    """

    section: RecoverySection
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] | None = None


class Method(Protocol):
    """One entry of ``compression.steps``; a module of :mod:`raylm.compression.methods` has its own as ``METHOD``.

    Attributes:
        exports: whether it makes the form that an engine runs; the model itself then stays as it is, and training comes
            before that, not after.
    """

    exports: bool

    def check(self, section: Section, outlook: Outlook) -> PretrainedConfig:
        """Refuse, before anything is written, what the method cannot do to this model.

        Returns:
            the model's configuration after the step.

        Raises:
            UserError: one line.
        """

    def needs_material(self, section: Section) -> bool:
        """Whether the step reads training samples."""

    def apply(self, section: Section, candidate: Candidate, output: Path) -> dict[str, Any]:
        """Write the smaller model (or its export) into ``output``, a directory that does not exist yet.

        Returns:
            what the report has of it.
        """

    def recovery(self, section: Section, candidate: Candidate, work: Path) -> Recovery | None:
        """The training that belongs to the step; None without one.

        Args:
            work: the step's directory.
        """

    def describe(self, section: Section) -> str:
        """What the method makes, in a few words."""
