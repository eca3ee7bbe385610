"""Products of matrices in int8 altogether: weights and activations, for encoders.

Outliers of activations are moved into the weights first (SmoothQuant, arXiv:2211.10438); then the ranges of activations
are fixed by what samples have.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

from raylm.compression.exporters.openvino import input_names
from raylm.compression.quantization.samples import GraphSamples
from raylm.models.openvino import EXPORT_MODEL


def to_int8_activations(plain: Path, output: Path, samples: GraphSamples) -> dict[str, Any]:
    """Write the export in ``plain``, of fp32, to ``output`` with products in int8.

    Returns:
        ``way``, in words.
    """
    import nncf
    import openvino

    graph = openvino.Core().read_model(plain / EXPORT_MODEL)
    names = input_names(graph)
    items = [{name: value for name, value in row.items() if name in names} for row in samples.calibration]
    # Its bars.
    with contextlib.redirect_stdout(io.StringIO()):
        quantized = nncf.quantize(
            graph,
            nncf.Dataset(items),
            subset_size=len(items),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            fast_bias_correction=True,
        )
    shutil.copytree(plain, output)
    openvino.save_model(quantized, output / EXPORT_MODEL, compress_to_fp16=False)
    return {"way": "smooth_quant"}
