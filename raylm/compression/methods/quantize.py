"""Quantization: weights of 8 bits with a scale per channel, or of 4 bits with one for each group.

The exporter rounds. Training beforehand (QAT) computes with weights that are rounded in the same way.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.compression.methods.base import Candidate, Outlook, Recovery
from raylm.config.quantization import QuantizeSection
from raylm.errors import UserError
from raylm.interrupts import insistent
from raylm.models.heads import CAUSAL
from raylm.models.openvino import ACTIVATION_GROUP, write_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SIZES = (32, 64, 128)


class Quantize:
    """See :class:`raylm.compression.methods.base.Method`."""

    exports = True

    def check(self, section: QuantizeSection, outlook: Outlook) -> PretrainedConfig:
        """Refuse to start without the exporter, or for a model that it has no such export of."""
        missing = [name for name in ("openvino", "openvino_genai", "nncf") if find_spec(name) is None]
        if missing:
            raise UserError(f"compression.steps: quantize needs {', '.join(missing)}: pip install 'raylm[cpu]'")
        if outlook.head.exporter is None:
            raise UserError(f"compression.steps: quantize has no export of a {outlook.head.what}")
        if section.activations == "int8" and outlook.head.network != "encoder":
            raise UserError(
                f"compression.steps: quantize.activations: found int8, allowed for a {outlook.head.what}: float, as "
                "its engine rounds activations while it runs"
            )
        if section.cache_bits != 32 and outlook.head != CAUSAL:
            raise UserError(
                f"compression.steps: quantize.cache_bits: found {section.cache_bits}, allowed for a "
                f"{outlook.head.what}: 32; a cache of fewer bits is a text generator's"
            )
        if section.method == "keep" and len(outlook.head.graphs) > 1:
            raise UserError(
                f"compression.steps: quantize.method: found keep, allowed for a {outlook.head.what}: any other"
            )
        if section.bits == 4:
            _check_groups(section, outlook)
        return outlook.config

    def needs_material(self, section: QuantizeSection) -> bool:
        """Whether activations are looked at, or the model is trained first."""
        blind = section.method in ("data_free", "keep") and section.megabytes is None
        aware = section.bits == 4 and not blind
        return aware or section.activations == "int8" or section.recovery is not None

    def apply(self, section: QuantizeSection, candidate: Candidate, output: Path) -> dict[str, Any]:
        """Export the model."""
        from raylm.compression.exporters import openvino

        with insistent():
            if section.bits == 8 and section.activations == "float":
                openvino.export_model(candidate.directory, output, candidate.head, section.bits)
                told: dict[str, Any] = {}
            else:
                told = _apply_to_graph(section, candidate, output)
        settings = {} if section.cache_bits == 32 else {"cache_bits": section.cache_bits}
        write_settings(output, {"activation_group": ACTIVATION_GROUP, **settings})
        return told

    def recovery(self, section: QuantizeSection, candidate: Candidate, work: Path) -> Recovery | None:
        """Training with rounded weights, where the file has it."""
        if section.recovery is None:
            return None
        return Recovery(section.recovery, {"rounding": {"group_size": section.group_size}})

    def describe(self, section: QuantizeSection) -> str:
        """``8-bit weights``."""
        trained = " after training with them" if section.recovery is not None else ""
        group = f" in groups of {section.group_size}" if section.bits == 4 else ""
        return f"{section.bits}-bit weights{group}{trained}"


def _check_groups(section: QuantizeSection, outlook: Outlook) -> None:
    """Refuse a group that does not divide the inputs of every matrix.

    Raises:
        UserError: names the sizes that do.
    """
    from raylm.models.rounding import kept_whole, rounded_layers
    from raylm.models.weights import make_outline

    model = make_outline(outlook.config, outlook.head).model
    widths = {layer.inputs for layer in rounded_layers(model, kept_whole(model))}
    if any(width % section.group_size for width in widths):
        fitting = [size for size in SIZES if not any(width % size for width in widths)]
        allowed = ", ".join(map(str, fitting)) or "none; 8 bits"
        shown = ", ".join(map(str, sorted(widths)))
        raise UserError(
            f"compression.steps: quantize.group_size: found {section.group_size}, allowed for matrices of {shown} "
            f"inputs: {allowed}"
        )


def _apply_to_graph(section: QuantizeSection, candidate: Candidate, output: Path) -> dict[str, Any]:
    """Export in fp32, and round the graph."""
    from raylm.compression.exporters import openvino
    from raylm.compression.quantization.four_bits import to_four_bits
    from raylm.compression.quantization.int8_activations import to_int8_activations
    from raylm.compression.quantization.samples import graph_samples

    samples = None
    # What training has got used to is rounded to the nearest.
    data_free = section.model_copy(update={"method": "data_free"}) if section.recovery is not None else section
    aware = data_free.method not in ("data_free", "keep") or data_free.megabytes is not None
    if aware or section.bits == 8:
        samples = graph_samples(candidate.material, candidate.head, section)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        plain = Path(scratch) / "fp32"
        openvino.export_model(candidate.directory, plain, candidate.head, None)
        if section.bits == 8:
            assert samples is not None
            return to_int8_activations(plain, output, samples)
        if samples is not None:
            samples = dataclasses.replace(samples, statistics=Path(scratch) / "statistics")
        return to_four_bits(plain, output, data_free, samples, os.cpu_count() or 1, candidate.head.graphs)


METHOD = Quantize()
