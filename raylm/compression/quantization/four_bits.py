"""Weights of 4 bits, a scale and a zero point for each group of them.

In: a graph in fp32, and samples. Out: the graph whose weights were rounded in the best of the ways that were asked for,
by its loss on samples that no calibration has seen. Embeddings and the last matrix have 8 bits, as nncf does by
default. The ways: to the nearest; AWQ (arXiv:2306.00978), which scales channels with large activations up before it
rounds; GPTQ (arXiv:2210.17323), which makes up for each rounding in the weights that follow; scale estimation, which
chooses scales by the error of the outputs.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylm.compression.quantization.samples import GraphSamples
from raylm.config.quantization import QuantizeSection
from raylm.errors import UserError
from raylm.models.openvino import EXPORT_MODEL, engine_properties

WAYS: dict[str, dict[str, bool]] = {
    "data_free": {},
    "scale_estimation": {"scale_estimation": True},
    "awq": {"awq": True},
    "awq_scale_estimation": {"awq": True, "scale_estimation": True},
    "gptq": {"gptq": True},
    "gptq_scale_estimation": {"gptq": True, "scale_estimation": True},
    "awq_gptq": {"awq": True, "gptq": True},
}
# Of the weights, how closely the share with 8 bits is found; a matrix has more.
FINEST_SHARE = 1 / 32
# nncf's vectorized rounding differs from its own reference in the last bit, which training has to repeat.
REFERENCE = "NNCF_DISABLE_OPTIMIZED_COMPRESSION"


def to_four_bits(
    plain: Path, output: Path, section: QuantizeSection, samples: GraphSamples | None, threads: int
) -> dict[str, Any]:
    """Write the export in ``plain``, of fp32, to ``output`` with weights of 4 bits.

    Args:
        samples: None for data_free.

    Returns:
        ``way``, the one that was taken; ``losses`` of all on what was held out, with ``fp32``; ``eight_bit_share``, the
        share of the weights of matrices that keep 8 bits.

    Raises:
        UserError: ``section.megabytes`` is less than all in 4 bits take.
    """
    shutil.copytree(plain, output)
    if section.method == "keep":
        return _kept(plain, output, section)
    names = list(WAYS) if section.method == "auto" else [section.method]
    if samples is None:
        _save(_compressed(plain, section, "data_free", None, 1.0), output)
        ratio = _fit(plain, output, section, "data_free", None) if section.megabytes else 1.0
        return {"way": "data_free", "eight_bit_share": 1.0 - ratio}
    reference, losses = None, {"fp32": 0.0}
    compiled = _compile(_read(plain), plain, threads)
    if samples.head.network == "encoder":
        reference = samples.outputs(compiled)
    losses["fp32"] = samples.loss(compiled, reference)
    best = ""
    for name in names:
        graph = _compressed(plain, section, name, samples, 1.0)
        losses[name] = samples.loss(_compile(graph, plain, threads), reference)
        if not best or losses[name] < losses[best]:
            best = name
            _save(graph, output)
    ratio = _fit(plain, output, section, best, samples) if section.megabytes else 1.0
    return {"way": best, "losses": losses, "eight_bit_share": 1.0 - ratio}


def _kept(plain: Path, output: Path, section: QuantizeSection) -> dict[str, Any]:
    """Keep the codes that the weights have."""
    from raylm.compression.quantization.kept import constants, keep_codes

    graph = _compressed(plain, section, "data_free", None, 1.0)
    matrices = keep_codes(graph, constants(_read(plain)))
    _save(graph, output)
    return {"way": "keep", "matrices": matrices, "eight_bit_share": 0.0}


def _fit(plain: Path, output: Path, section: QuantizeSection, way: str, samples: GraphSamples | None) -> float:
    """Give 8 bits to as many matrices as ``section.megabytes`` has room for, those first that suffer most from 4; the
    share of the weights that keep 4 bits."""
    assert section.megabytes is not None
    least = _megabytes(output)
    if least > section.megabytes:
        raise UserError(
            f"compression.steps: quantize.megabytes: found {section.megabytes:g}, allowed: {least:.4g} or more, which "
            "all matrices take with 4 bits"
        )
    ratio, step = 1.0, 0.5
    while step >= FINEST_SHARE:
        graph = _compressed(plain, section, way, samples, ratio - step)
        if _graph_megabytes(graph) <= section.megabytes:
            ratio -= step
            _save(graph, output)
        step /= 2
    return ratio


def _compressed(plain: Path, section: QuantizeSection, way: str, samples: GraphSamples | None, ratio: float) -> Any:
    """The graph with its weights rounded.

    Args:
        ratio: share of the weights that get 4 bits.
    """
    import nncf

    aware: dict[str, Any] = {}
    if samples is not None and (WAYS[way] or ratio < 1.0):
        aware = {"dataset": nncf.Dataset(samples.calibration), "subset_size": len(samples.calibration), **WAYS[way]}
    with _reference_rounding(), contextlib.redirect_stdout(io.StringIO()):
        return nncf.compress_weights(
            _read(plain),
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            ratio=ratio,
            group_size=section.group_size,
            backup_mode=nncf.BackupMode.INT8_ASYM,
            **aware,
        )


@contextlib.contextmanager
def _reference_rounding() -> Iterator[None]:
    before = os.environ.get(REFERENCE)
    os.environ[REFERENCE] = "1"
    try:
        yield
    finally:
        del os.environ[REFERENCE]
        if before is not None:
            os.environ[REFERENCE] = before


def _read(directory: Path) -> Any:
    import openvino

    return openvino.Core().read_model(directory / EXPORT_MODEL)


def _compile(graph: Any, directory: Path, threads: int) -> Any:
    import openvino

    return openvino.Core().compile_model(graph, "CPU", engine_properties(directory, threads))


def _save(graph: Any, directory: Path) -> None:
    import openvino

    openvino.save_model(graph, directory / EXPORT_MODEL, compress_to_fp16=False)


def _megabytes(directory: Path) -> float:
    return (directory / EXPORT_MODEL).with_suffix(".bin").stat().st_size / 1e6


def _graph_megabytes(graph: Any) -> float:
    """What the constants of a graph take on disk."""
    return sum(op.get_byte_size() for op in graph.get_ops() if op.get_type_name() == "Constant") / 1e6
