"""Quantization of weights: 8 bits with a scale per channel; activations stay in floating point.

The exporter rounds the weights, to the nearest of its values. Nothing is trained, so there is nothing to recover.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from raylm.compression.methods.base import Candidate
from raylm.config.compression import QuantizeSection
from raylm.errors import UserError
from raylm.models.heads import Head


class Quantize:
    """See :class:`raylm.compression.methods.base.Method`."""

    def check(self, section: QuantizeSection, head: Head) -> None:
        """Refuse to start without the exporter, or for a model that it has no export of."""
        missing = [name for name in ("openvino", "openvino_genai", "nncf") if find_spec(name) is None]
        if missing:
            raise UserError(f"compression.steps: quantize needs {', '.join(missing)}: pip install 'raylm[cpu]'")
        if head.exporter is None:
            raise UserError(f"compression.steps: quantize has no export of a {head.what}")

    def apply(self, section: QuantizeSection, candidate: Candidate) -> None:
        """Tell the exporter."""
        candidate.weight_bits = section.bits

    def recover(self, section: QuantizeSection, candidate: Candidate) -> None:
        """Nothing to do."""

    def describe(self, section: QuantizeSection) -> str:
        """``8-bit weights``."""
        return f"{section.bits}-bit weights"

    def report(self, section: QuantizeSection, candidate: Candidate) -> dict[str, Any]:
        """The section."""
        return section.model_dump(mode="json")


METHOD = Quantize()
