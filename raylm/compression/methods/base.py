"""What every compression method gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raylm.config.base import Section
from raylm.models.heads import Head


@dataclass
class Candidate:
    """The model on its way to a smaller one.

    Attributes:
        directory: a Hugging Face directory that methods change in place; the original is elsewhere.
        head: of the model.
        weight_bits: what an exporter stores the weights in; None for as they are.
    """

    directory: Path
    head: Head
    weight_bits: int | None = None


class Method(Protocol):
    """One entry of ``compression.steps``; a module of :mod:`raylm.compression.methods` has its own as ``METHOD``."""

    def check(self, section: Section, head: Head) -> None:
        """Refuse, before anything is written, what the method cannot do to a model with this head.

        Raises:
            UserError: one line.
        """

    def apply(self, section: Section, candidate: Candidate) -> None:
        """Make the model smaller."""

    def recover(self, section: Section, candidate: Candidate) -> None:
        """Win back what that cost, by training or calibration; many methods have nothing to do here."""

    def describe(self, section: Section) -> str:
        """What the method makes, in a few words."""

    def report(self, section: Section, candidate: Candidate) -> dict[str, Any]:
        """What stands in ``report.json`` of it."""
