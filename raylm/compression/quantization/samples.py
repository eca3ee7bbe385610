"""Training samples as an exported graph takes them, and how well a graph does on others of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.compression.exporters.openvino import GraphScorer, graph_inputs, input_names
from raylm.models.heads import CAUSAL, Head

if TYPE_CHECKING:
    from raylm.compression.material import Material
    from raylm.config.quantization import QuantizeSection

# Of the samples that activations are measured on, how many others forms are compared on.
HELD_OUT = 0.5

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class GraphSamples:
    """Samples of the training split for one graph.

    Attributes:
        calibration: what activations are measured on, a sample each.
        held_out: further ones, which the calibration has not seen; ``targets`` among them.
        statistics: folder where what was measured of the activations is kept, of one graph.
    """

    head: Head
    calibration: list[Arrays]
    held_out: list[Arrays]
    statistics: Path | None = None

    def loss(self, compiled: Any, reference: Sequence[np.ndarray] | None) -> float:
        """How badly a compiled graph does on what was held out; smaller is better.

        Args:
            reference: outputs of the graph before its weights were rounded, see :meth:`outputs`.

        Returns:
            nats a target of a text generator; of others the error of the outputs, as a share of their size.
        """
        if self.head == CAUSAL:
            scorer = GraphScorer(compiled)
            nats = sum(scorer(batch["input_ids"], batch["targets"]) for batch in self.held_out)
            return nats / max(1, sum(int((batch["targets"] >= 0).sum()) for batch in self.held_out))
        assert reference is not None
        found = self.outputs(compiled)
        error = sum(float(np.square(a - b).sum()) for a, b in zip(found, reference, strict=True))
        return error / sum(float(np.square(b).sum()) for b in reference)

    def outputs(self, compiled: Any) -> list[np.ndarray]:
        """What a compiled graph of an encoder gives for what was held out."""
        request, names = compiled.create_infer_request(), input_names(compiled)
        found = []
        for batch in self.held_out:
            result = request.infer({name: value for name, value in batch.items() if name in names})
            found.append(np.concatenate([np.array(result[name]).ravel() for name in self.head.outputs]))
        return found


def graph_samples(material: Material, head: Head, section: QuantizeSection) -> GraphSamples:
    """Take the samples that ``section`` asks for, and half as many more.

    Raises:
        UserError: the data does not fit the length, or there is too little of it.
    """
    from raylm.errors import UserError

    wanted = section.samples + max(1, int(section.samples * HELD_OUT))
    rows: list[Arrays] = []
    for batch in material.batches(wanted, section.sequence_length):
        arrays = {name: values.numpy() for name, values in batch.items()}
        rows += [{name: values[i : i + 1] for name, values in arrays.items()} for i in range(len(arrays["input_ids"]))]
    if len(rows) < 2:
        raise UserError(
            f"compression.steps: quantize.sequence_length: found {section.sequence_length}, of which the training data "
            f"has {len(rows)}, allowed: what it has two or more of, to calibrate on one and compare on the other"
        )
    # Of few samples half as many are for comparing.
    first = min(section.samples, max(1, int(len(rows) / (1 + HELD_OUT))))
    calibration = [_inputs(row, head) for row in rows[:first]]
    return GraphSamples(head, calibration, rows[first:])


def _inputs(row: Arrays, head: Head) -> Arrays:
    return graph_inputs(row["input_ids"]) if head == CAUSAL else row
