"""The OpenVINO exporter, and scoring with the exported graph."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raylm import telemetry
from raylm.config.quantization import QuantizeSection
from raylm.data.loading import load_tokenizer
from raylm.evaluation.perplexity import summed_nats
from raylm.models.heads import CAUSAL, Head
from raylm.models.openvino import (
    EXPORT_DETOKENIZER,
    EXPORT_MODEL,
    EXPORT_TOKENIZER,
    engine_properties,
    find_export,
    how_it_runs,
)

# Libraries of the export, and from which level on they report.
EXPORT_LEVELS = {
    "nncf": logging.ERROR,
    "optimum": logging.ERROR,
    "transformers": logging.ERROR,
    # nncf imports it, and it warns where there is a CUDA compiler and no GPU.
    "torch.utils.cpp_extension": logging.ERROR,
    # It traces an encoder-decoder as it is, which is as well, and calls that an error.
    "openvino.frontend.pytorch.utils": logging.CRITICAL,
}


def describe(quantized: QuantizeSection | None) -> str:
    """The engine and what it computes with, in words."""
    return f"OpenVINO {f'int{quantized.bits}' if quantized else 'fp32'}"


def export_model(model_directory: str | Path, output: Path, head: Head = CAUSAL, weight_bits: int | None = 8) -> None:
    """Write an OpenVINO export of the model in ``model_directory`` into ``output``.

    Args:
        head: the model's; one that has an exporter.
        weight_bits: 8, with a scale per channel; None for as the weights are.
    """
    assert head.exporter is not None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    telemetry.silence()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with _only_errors():
            from optimum import intel
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            exporter = getattr(intel, head.exporter)
        # Once more: a library that is imported sets its own level.
        with _only_errors():
            settings = intel.OVWeightQuantizationConfig(bits=weight_bits) if weight_bits else None
            model = exporter.from_pretrained(model_directory, export=True, compile=False, quantization_config=settings)
            model.save_pretrained(output)
            if head == CAUSAL:
                _export_tokenizer(model_directory, output)


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Let the libraries of the export report errors alone.

    Tracing a model reads every attribute and calls it by old argument names, each of which transformers warns of.
    optimum looks for a directory in the hub's cache where the hub is switched off, and warns that it is not there.
    """
    before = {name: logging.getLogger(name).level for name in EXPORT_LEVELS}
    for name, level in EXPORT_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _export_tokenizer(model_directory: str, output: Path) -> None:
    """Write OpenVINO's form of the tokenizer, which the engine needs to make an answer follow a schema.

    Tokenizers that it has no form for (of words or characters) are left out: nothing else needs one.
    """
    import openvino
    from openvino_tokenizers import convert_tokenizer

    tokenizer = load_tokenizer(model_directory)
    try:
        converted = convert_tokenizer(tokenizer, with_detokenizer=True)
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, AssertionError) as error:
        logging.getLogger("raylm").info("no OpenVINO tokenizer of %s: %s", model_directory, error)
        return
    for part, name in zip(converted, (EXPORT_TOKENIZER, EXPORT_DETOKENIZER), strict=True):
        openvino.save_model(part, output / name)


def graph_inputs(input_ids: np.ndarray) -> dict[str, np.ndarray]:
    """What the graph of a causal model takes beside ``input_ids``, int64 [rows, time]; a graph may lack some."""
    rows, time = input_ids.shape
    return {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "position_ids": np.broadcast_to(np.arange(time), (rows, time)).copy(),
        "beam_idx": np.arange(rows, dtype=np.int32),
    }


def input_names(graph: Any) -> set[str]:
    """Names of the inputs of a graph, compiled or not."""
    return {name for port in graph.inputs for name in port.get_names()}


class GraphScorer:
    """Scores batches like :class:`~raylm.evaluation.perplexity.TransformersScorer`, with a compiled causal graph."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = input_names(compiled)

    def logits(self, input_ids: np.ndarray) -> np.ndarray:
        """``input_ids`` int64 [rows, time] to logits fp32 [rows, time, vocabulary]."""
        self._request.reset_state()
        values = graph_inputs(input_ids)
        result = self._request.infer({name: value for name, value in values.items() if name in self._inputs})
        return result["logits"]

    def __call__(self, input_ids: np.ndarray, targets: np.ndarray) -> float:
        """Summed negative log-likelihood, nats, of ``targets`` (-100 not counted)."""
        return summed_nats(self.logits(input_ids), targets)


class OpenVINOScorer(GraphScorer):
    """A :class:`GraphScorer` of the export in a model ``directory``, which runs as it is served.

    Attributes:
        ran: the engine's own word of how it computes.
    """

    def __init__(self, directory: str | Path, threads: int) -> None:
        import openvino

        export = find_export(directory)
        assert export is not None
        compiled = openvino.Core().compile_model(export / EXPORT_MODEL, "CPU", engine_properties(export, threads))
        super().__init__(compiled)
        self.ran = how_it_runs(compiled)
