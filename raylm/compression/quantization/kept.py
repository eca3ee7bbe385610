"""Weights that lie on 16 values a group already, as those of a GGUF file with 4 bits do, kept as they are.

In: a graph that was rounded to 4 bits in groups of 32, and the fp32 graph that it was made of. Out: the first with the
second's own codes, scales and minima. A group of Q4_1 is ``minimum + scale x code`` (github.com/ggml-org/llama.cpp,
ggml/src/ggml-common.h), so that its zero point, ``-minimum / scale``, is no integer and is stored in half precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raylm.errors import UserError

GROUP, LEVELS = 32, 15
# Of a step between two values, how far a weight may be from its value: what half precision makes of both.
TOLERANCE = 0.02


def codes_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Codes [outputs, groups, 32], zero points and scales [outputs, groups, 1] of ``weight`` [outputs, inputs]; None
    where it does not lie on such values."""
    groups = weight.reshape(weight.shape[0], -1, GROUP).astype(np.float64)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    scale = (high - low) / LEVELS
    # All alike: any step will do.
    scale = np.where(scale == 0, np.maximum(np.abs(low), 1e-8) / LEVELS, scale)
    places = (groups - low) / scale
    codes = np.round(places)
    if np.abs(places - codes).max() > TOLERANCE:
        return None
    return codes.astype(np.uint8), (-low / scale).astype(np.float32), scale.astype(np.float32)


def keep_codes(graph: Any, weights: dict[str, np.ndarray]) -> int:
    """Put the own codes of ``weights`` into ``graph``; how many matrices that were.

    Args:
        graph: as nncf rounds it; changed in place.
        weights: name of a constant -> its values in fp32.

    Raises:
        UserError: a matrix does not lie on 16 values a group.
    """
    import openvino

    count = 0
    for subtract in [op for op in graph.get_ops() if op.get_type_name() == "Subtract"]:
        convert = subtract.input_value(0).get_node()
        if convert.get_type_name() != "Convert":
            continue
        old = convert.input_value(0).get_node()
        if old.get_element_type() != openvino.Type.u4:
            continue
        name = old.get_friendly_name()
        found = codes_of(weights[name])
        if found is None:
            raise UserError(
                f"compression.steps: quantize.method: found keep, allowed for weights that have 16 values a group of "
                f"{GROUP} already; {name} has others"
            )
        codes, zero, scale = found
        multiply = next(iter(subtract.output(0).get_target_inputs())).get_node()
        _replace(convert, 0, _packed(codes, name))
        _replace(subtract, 1, _half(zero, f"{name}/zero_point"))
        _replace(multiply, 1, _half(scale, f"{name}/scale"))
        count += 1
    graph.validate_nodes_and_infer_types()
    return count


def constants(graph: Any) -> dict[str, np.ndarray]:
    """The matrices of a graph in fp32, by name."""
    return {
        op.get_friendly_name(): op.get_data()
        for op in graph.get_ops()
        if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) == 2
    }


def _replace(node: Any, number: int, constant: Any) -> None:
    node.input(number).replace_source_output(constant.output(0))


def _packed(codes: np.ndarray, name: str) -> Any:
    """A constant of 4 bits, the first of two numbers in the low half of a byte."""
    import openvino
    from openvino import opset13

    pairs = codes.reshape(-1, 2)
    packed = (pairs[:, 0] | (pairs[:, 1] << 4)).astype(np.uint8)
    # Memory of its own: one that shares the array's outlives it.
    tensor = openvino.Tensor(openvino.Type.u4, openvino.Shape(list(codes.shape)))
    tensor.data[:] = packed.reshape(tensor.data.shape)
    return opset13.constant(tensor, name=name)


def _half(values: np.ndarray, name: str) -> Any:
    from openvino import opset13

    return opset13.constant(values.astype(np.float16), name=name)
