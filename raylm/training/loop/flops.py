"""Floating-point operations of training, and what the machine can do: the two sides of model FLOPs utilisation.

FLOPs a token, forward and backward: 6 * N + 12 * L * d * T, with N the parameters that take part in matrix products
(embeddings that are looked up do not; the output head does, tied or not), L layers, d the attention width and T the
sequence length (Chowdhery et al. 2022, appendix B); causal attention is counted as half of that product. An encoder and
a decoder are counted each on its own tokens, cross-attention between the two, and the sum divided by the encoder's
tokens, which are the ones that metrics count.
"""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from raylm.cluster.hardware import known_peak
from raylm.models.families import find_family
from raylm.models.structure import lookup_names

FORMULA = "6*N_matmul + 12*layers*width*sequence_length FLOPs a token (causal attention at half)"
MATRIX_SIZE = 1024


def flops_per_token(model: PreTrainedModel, sequence_length: int, target_length: int = 0) -> float:
    """Training FLOPs a token by :data:`FORMULA`; its weights may be on torch's meta device.

    Args:
        sequence_length: T; of an encoder and a decoder, the encoder's.
        target_length: tokens of the decoder, where the model has both.
    """
    config = model.config
    head, looked_up = model.get_output_embeddings(), lookup_names(model)
    products = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.ndim >= 2 and name not in looked_up and not (head is not None and p is head.weight)
    }
    out = head.weight.numel() if head is not None else 0
    width = config.hidden_size
    if (head_width := getattr(config, "head_dim", None)) is not None:
        width = head_width * config.num_attention_heads
    if config.is_encoder_decoder:
        long, short = sequence_length, target_length
        family = find_family(config.model_type)
        # A decoder's cross-attention reads keys and values of the encoder's tokens.
        reading = (".encoder.", *(family.reads_encoder if family is not None else ()))
        encoded = sum(n for name, n in products.items() if any(part in f".{name}" for part in reading))
        decoded = sum(products.values()) - encoded + out
        attention = 12.0 * width * (config.num_hidden_layers * long * long)
        attention += width * config.num_decoder_layers * (6.0 * short * short + 12.0 * short * long)
        return (6.0 * (encoded * long + decoded * short) + attention) / long
    causal = 6.0 if model.can_generate() else 12.0
    attention = causal * config.num_hidden_layers * width * sequence_length
    return 6.0 * (sum(products.values()) + out) + attention


def peak_flops(device: torch.device, seconds: float = 0.5) -> float:
    """Matrix-product peak of this process, FLOP/s: from the data sheet on a known GPU, else measured in fp32."""
    if device.type == "cuda":
        peak = known_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak
    a = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device)
    b = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device)
    a @ b
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * MATRIX_SIZE**3 / best
