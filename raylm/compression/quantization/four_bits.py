"""Weights of 4 bits, a scale and a zero point for each group of them.

In: an export in fp32, and samples. Out: the export whose weights were rounded in the best of the ways that were asked
for, by its loss on samples that no calibration has seen. Embeddings and the last matrix have 8 bits, as nncf does by
default. The ways: to the nearest; AWQ (arXiv:2306.00978), which scales
channels with large activations up before it rounds; GPTQ (arXiv:2210.17323), which makes up for each rounding in the
weights that follow; scale estimation, which chooses scales by the error of the outputs.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylm.compression.quantization.samples import Calibration, GraphSamples
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


Graphs = dict[str, Any]


def to_four_bits(
    plain: Path,
    output: Path,
    section: QuantizeSection,
    samples: GraphSamples | None,
    threads: int,
    names: Sequence[str] = (EXPORT_MODEL,),
) -> dict[str, Any]:
    """Write the export in ``plain``, of fp32, to ``output`` with weights of 4 bits.

    Args:
        samples: None for data_free.
        names: of its graphs.

    Returns:
        ``way``, the one that was taken; ``losses`` of all on what was held out, with ``fp32``; ``eight_bit_share``, the
        share of the weights of matrices that keep 8 bits.

    Raises:
        UserError: ``section.megabytes`` is less than all in 4 bits take.
    """
    shutil.copytree(plain, output)
    if section.method == "keep":
        return _kept(plain, output, section)
    ways = list(WAYS) if section.method == "auto" else [section.method]
    if samples is None:
        _save({name: _compressed(plain / name, section, "data_free", None, 1.0) for name in names}, output)
        ratio = _fit(plain, output, section, "data_free", dict.fromkeys(names)) if section.megabytes else 1.0
        return {"way": "data_free", "eight_bit_share": 1.0 - ratio}
    reference, losses = None, {"fp32": 0.0}
    compiled = {name: _compile(_read(plain / name), plain, threads) for name in names}
    if samples.head.network == "encoder":
        reference = samples.outputs(compiled)
    losses["fp32"] = samples.loss(compiled, reference)
    calibrations = samples.of_graphs(compiled)
    best = ""
    for way in ways:
        graphs = {name: _compressed(plain / name, section, way, calibrations[name], 1.0) for name in names}
        losses[way] = samples.loss({n: _compile(graph, plain, threads) for n, graph in graphs.items()}, reference)
        if not best or losses[way] < losses[best]:
            best = way
            _save(graphs, output)
    ratio = _fit(plain, output, section, best, calibrations) if section.megabytes else 1.0
    return {"way": best, "losses": losses, "eight_bit_share": 1.0 - ratio}


def _kept(plain: Path, output: Path, section: QuantizeSection) -> dict[str, Any]:
    """Keep the codes that the weights have."""
    from raylm.compression.quantization.kept import constants, keep_codes

    graph = _compressed(plain / EXPORT_MODEL, section, "data_free", None, 1.0)
    matrices = keep_codes(graph, constants(_read(plain / EXPORT_MODEL)))
    _save({EXPORT_MODEL: graph}, output)
    return {"way": "keep", "matrices": matrices, "eight_bit_share": 0.0}


def _fit(
    plain: Path, output: Path, section: QuantizeSection, way: str, calibrations: Mapping[str, Calibration | None]
) -> float:
    """Give 8 bits to as many matrices as ``section.megabytes`` has room for, those first that suffer most from 4; the
    share of the weights that keep 4 bits."""
    assert section.megabytes is not None
    least = sum((output / name).with_suffix(".bin").stat().st_size for name in calibrations) / 1e6
    if least > section.megabytes:
        raise UserError(
            f"compression.steps: quantize.megabytes: found {section.megabytes:g}, allowed: {least:.4g} or more, which "
            "all matrices take with 4 bits"
        )
    ratio, step = 1.0, 0.5
    while step >= FINEST_SHARE:
        graphs = {name: _compressed(plain / name, section, way, c, ratio - step) for name, c in calibrations.items()}
        if sum(_graph_megabytes(graph) for graph in graphs.values()) <= section.megabytes:
            ratio -= step
            _save(graphs, output)
        step /= 2
    return ratio


def _compressed(path: Path, section: QuantizeSection, way: str, calibration: Calibration | None, ratio: float) -> Any:
    """The graph at ``path`` with its weights rounded.

    Args:
        ratio: share of the weights that get 4 bits.
    """
    import nncf

    aware: dict[str, Any] = {}
    if calibration is not None and (WAYS[way] or ratio < 1.0):
        items = calibration.items
        aware = {"dataset": nncf.Dataset(items), "subset_size": len(items), **WAYS[way]}
        if calibration.statistics is not None:
            # Measured once for all ways.
            kept = nncf.AdvancedCompressionParameters(statistics_path=str(calibration.statistics))
            aware["advanced_parameters"] = kept
    with _reference_rounding(), contextlib.redirect_stdout(io.StringIO()):
        return nncf.compress_weights(
            _read(path),
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


def _read(path: Path) -> Any:
    import openvino

    return openvino.Core().read_model(path)


def _compile(graph: Any, directory: Path, threads: int) -> Any:
    import openvino

    return openvino.Core().compile_model(graph, "CPU", engine_properties(directory, threads))


def _save(graphs: Graphs, directory: Path) -> None:
    """Write graphs under their names."""
    import openvino

    for name, graph in graphs.items():
        openvino.save_model(graph, directory / name, compress_to_fp16=False)


def _graph_megabytes(graph: Any) -> float:
    """What the constants of a graph take on disk."""
    return sum(op.get_byte_size() for op in graph.get_ops() if op.get_type_name() == "Constant") / 1e6
