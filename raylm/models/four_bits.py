"""A model whose linear layers keep their weights in 4 bits while adapters are trained beside them: QLoRA
(Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

In: a model whose parameters have no memory yet. Out: the same model with layers that take NF4 numbers, each of which
is made as soon as its weight has been read. Section 3 of the paper: 64 weights share a constant, 256 of these constants
are 8-bit numbers that share another.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from raylm.models.adapters import linear_layers
from raylm.models.heads import Head

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import PreTrainedModel

# Of a weight: its own, its share of an 8-bit constant, and of the fp32 constant of 256 of these.
BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def four_bit_layers(model: PreTrainedModel, head: Head) -> dict[str, Any]:
    """The layers whose weights are kept in 4 bits, by name: linear ones, but for those that transformers leaves as
    they are too, when it loads a model so."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {name: layer for name, layer in linear_layers(model, head).items() if kept.isdisjoint(name.split("."))}


def keep_in_four_bits(model: PreTrainedModel, head: Head, computed: torch.dtype) -> None:
    """Give ``model`` layers that take 4-bit weights, which they get when the model is filled.

    Args:
        model: without adapters, and without memory for its parameters.
        computed: type in which layers multiply; weights are rounded to it first.
    """
    for name, layer in four_bit_layers(model, head).items():
        model.set_submodule(name, _four_bit_layer(layer, computed))
    # By which peft and transformers tell such a model.
    model.is_loaded_in_4bit = True


def _four_bit_layer(layer: Any, computed: torch.dtype) -> Linear4bit:
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    transposed = isinstance(layer, Conv1D)
    outputs, inputs = reversed(layer.weight.shape) if transposed else layer.weight.shape
    made = Linear4bit(inputs, outputs, bias=layer.bias is not None, compute_dtype=computed, device="meta")
    # In evaluation it would repack the weights for AVX-512, after which nothing has a gradient.
    made.support_avx512bf16_for_cpu = False
    made.weight, made.bias = layer.weight, layer.bias
    made.weight.pack = functools.partial(_packed, layer=made, computed=computed, transposed=transposed)
    made.requires_grad_(False)
    return made.train(layer.training)


def _packed(values: torch.Tensor, layer: Linear4bit, computed: torch.dtype, transposed: bool) -> Params4bit:
    """A whole weight in NF4, on its device.

    Args:
        values: [outputs, inputs], or [inputs, outputs] where they are ``transposed`` as GPT-2 has them.
    """
    from bitsandbytes.nn import Params4bit

    values = (values.t() if transposed else values).to(computed).contiguous()
    weight = Params4bit(values, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    return weight.to(values.device)
