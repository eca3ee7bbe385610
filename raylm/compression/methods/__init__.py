"""The compression methods: a module each, named as its key of ``compression.steps``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raylm.compression.methods.base import Candidate, Method
from raylm.config.base import Section
from raylm.config.compression import StepSection
from raylm.models.heads import Head


@dataclass(frozen=True)
class Steps:
    """The steps of a ``compression`` section, in order.

    Attributes:
        sections: as the file has them.
    """

    sections: list[StepSection]

    def __iter__(self) -> Iterator[tuple[str, Method, Section]]:
        for step in self.sections:
            name, section = step.chosen
            yield name, importlib.import_module(f"raylm.compression.methods.{name}").METHOD, section

    def check(self, head: Head) -> None:
        """Refuse what a step cannot do.

        Raises:
            UserError: one line.
        """
        for _, method, section in self:
            method.check(section, head)

    def apply(self, candidate: Candidate) -> list[dict[str, Any]]:
        """Apply all; returns what each has to report."""
        reports = []
        for name, method, section in self:
            method.apply(section, candidate)
            method.recover(section, candidate)
            reports.append({name: method.report(section, candidate)})
        return reports

    def describe(self) -> str:
        """What comes out, in a few words."""
        return ", ".join(method.describe(section) for _, method, section in self)
