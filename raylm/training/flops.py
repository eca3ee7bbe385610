"""Floating-point operations of training, and what the machine can do: the two sides of model FLOPs utilisation.

FLOPs a token, forward and backward: 6 * N + 6 * L * d * T, with N the parameters that take part in matrix products
(embeddings that are looked up do not; the output head does, tied or not), L layers, d the attention width and T the
sequence length; causal attention is counted as half of the full T x T product (Chowdhery et al. 2022, appendix B,
counts it whole).
"""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

FORMULA = "6*N_matmul + 6*layers*width*sequence_length FLOPs a token (causal attention at half)"
MATRIX_SIZE = 1024

# Dense bf16 peaks, FLOP/s, from NVIDIA's data sheets; the first name that the device's name contains.
GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "T4": 65e12}


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Training FLOPs a token by :data:`FORMULA`."""
    config = model.config
    looked_up = {id(model.get_input_embeddings().weight)}
    if getattr(model, "transformer", None) is not None and hasattr(model.transformer, "wpe"):
        looked_up.add(id(model.transformer.wpe.weight))
    head = model.get_output_embeddings()
    products = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up)
    if head is not None and id(head.weight) in looked_up:
        products += head.weight.numel()
    return 6.0 * products + 6.0 * config.num_hidden_layers * config.hidden_size * sequence_length


def peak_flops(device: torch.device, seconds: float = 0.5) -> float:
    """Matrix-product peak of this process, FLOP/s: from the data sheet on a known GPU, else measured in fp32."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in GPU_PEAKS.items():
            if known in name:
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
