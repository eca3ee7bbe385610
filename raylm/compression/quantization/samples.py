"""Training samples as an exported graph takes them, and how well a graph does on others of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.compression.exporters.openvino import GraphScorer, graph_inputs, input_names
from raylm.models.encoder_decoders import Graphs, decoder_inputs
from raylm.models.heads import CAUSAL, Head
from raylm.models.loading import load_config
from raylm.models.openvino import EXPORT_DECODER, EXPORT_ENCODER, EXPORT_MODEL

if TYPE_CHECKING:
    from raylm.compression.material import Material
    from raylm.config.quantization import QuantizeSection
    from raylm.tasks.objective import Batch

# Of the samples that activations are measured on, how many others forms are compared on.
HELD_OUT = 0.5
ENCODER_INPUTS = ("input_ids", "attention_mask")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Calibration:
    """What activations of one graph are measured on.

    Attributes:
        items: its inputs, a sample each.
        statistics: folder where what was measured is kept.
    """

    items: list[Arrays]
    statistics: Path | None = None


@dataclass(frozen=True)
class GraphSamples:
    """Samples of the training split for an export.

    Attributes:
        calibration: what activations are measured on, a sample each.
        held_out: further ones, which the calibration has not seen; ``targets`` among them.
        statistics: folder where what was measured of the activations is kept, of one export.
    """

    head: Head
    calibration: list[Arrays]
    held_out: list[Arrays]
    statistics: Path | None = None

    def of_graphs(self, compiled: Mapping[str, Any]) -> dict[str, Calibration]:
        """The calibration of each graph by its name; a decoder's has what the encoder gives.

        Args:
            compiled: the graphs before their weights are rounded.
        """
        items = dict.fromkeys(compiled, self.calibration)
        if self.head.network == "encoder_decoder":
            graphs, masks = Graphs(compiled), [row["attention_mask"] for row in self.calibration]
            items[EXPORT_ENCODER] = [{name: row[name] for name in ENCODER_INPUTS} for row in self.calibration]
            items[EXPORT_DECODER] = [
                decoder_inputs(graphs.read(row["input_ids"], mask), mask, row["decoder_input_ids"])
                for row, mask in zip(self.calibration, masks, strict=True)
            ]
        kept = self.statistics
        return {name: Calibration(rows, kept and kept / Path(name).stem) for name, rows in items.items()}

    def loss(self, compiled: Mapping[str, Any], reference: Sequence[np.ndarray] | None) -> float:
        """How badly compiled graphs do on what was held out; smaller is better.

        Args:
            compiled: by their names.
            reference: outputs of the graph before its weights were rounded, see :meth:`outputs`.

        Returns:
            nats a target of what writes text; of others the error of the outputs, as a share of their size.
        """
        if self.head.network == "encoder":
            assert reference is not None
            found = self.outputs(compiled)
            error = sum(float(np.square(a - b).sum()) for a, b in zip(found, reference, strict=True))
            return error / sum(float(np.square(b).sum()) for b in reference)
        if self.head.network == "encoder_decoder":
            graphs = Graphs(compiled)
            nats = sum(float(graphs.losses(row).sum()) for row in self.held_out)
        else:
            scorer = GraphScorer(compiled[EXPORT_MODEL])
            nats = sum(scorer(batch["input_ids"], batch["targets"]) for batch in self.held_out)
        return nats / max(1, sum(int((batch["targets"] >= 0).sum()) for batch in self.held_out))

    def outputs(self, compiled: Mapping[str, Any]) -> list[np.ndarray]:
        """What a compiled graph of an encoder gives for what was held out."""
        graph = compiled[EXPORT_MODEL]
        request, names = graph.create_infer_request(), input_names(graph)
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
        given = batch | _decoder_side(batch, material) if head.network == "encoder_decoder" else batch
        arrays = {name: values.numpy() for name, values in given.items()}
        rows += [{name: values[i : i + 1] for name, values in arrays.items()} for i in range(len(arrays["input_ids"]))]
    if len(rows) < 2:
        raise UserError(
            f"compression.steps: quantize.sequence_length: found {section.sequence_length}, of which the training data "
            f"has {len(rows)}, allowed: what it has two or more of, to calibrate on one and compare on the other"
        )
    # Of few samples half as many are for comparing.
    first = min(section.samples, max(1, int(len(rows) / (1 + HELD_OUT))))
    calibration = [graph_inputs(row["input_ids"]) if head == CAUSAL else row for row in rows[:first]]
    return GraphSamples(head, calibration, rows[first:])


def _decoder_side(batch: Batch, material: Material) -> Batch:
    """What an encoder-decoder's graphs take beside the text: the decoder's tokens, and a mask, which hides nothing
    where the samples have none."""
    import torch

    given = material.objective.inputs(batch, load_config(material.source))
    return {"attention_mask": torch.ones_like(batch["input_ids"])} | given
