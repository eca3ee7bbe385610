"""``training.precision: auto`` on a CPU: fp32 or bf16, by how long a layer of the model's width takes in each.

In: the model's width and how a worker computes. Out: the decision with the measured figures, which the run keeps. A CPU
with AVX512-BF16 or AMX multiplies bf16 matrices several times as fast as fp32 ones; one without imitates them a hundred
times slower; and small matrices are not worth the conversions. So it is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from raylm.config.stages import TrainConfig

# Of the measured layer. What else a step does (attention, embeddings, optimizer, gradients between workers) gains less:
# a layer at 1.4 stands for a step at about 1.2.
LEAST_GAIN = 1.4
# No step of a model this narrow was faster in bf16; nothing is measured.
NARROW = 64
# Larger matrices gain more, and take longer to measure.
MOST_ROWS, MOST_WIDTH = 1024, 256
# A first look at few rows is enough where bf16 takes this many times longer.
FIRST_ROWS, HOPELESS = 32, 10.0
REPEATS, SECONDS = 7, 0.4


@dataclass(frozen=True)
class LayerTimes:
    """What one worker takes for a feed-forward layer, forward and backward.

    Attributes:
        node: the host's name.
        rows, width: its two matrix products are (rows x width) by (width x 4 width) and back.
        fp32, bf16: milliseconds.
    """

    node: str
    rows: int
    width: int
    fp32: float
    bf16: float

    @property
    def gain(self) -> float:
        """How many times as fast bf16 is."""
        return self.fp32 / self.bf16


@dataclass(frozen=True)
class Precision:
    """A decision.

    Attributes:
        name: fp32, bf16, or auto where workers hold GPUs and the plan's own rule applies.
        reason: why, in words.
        times: of each node, where something was measured.
    """

    name: str
    reason: str
    times: tuple[LayerTimes, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"precision": self.name, "reason": self.reason, "layer_milliseconds": [asdict(t) for t in self.times]}


def decide(times: list[LayerTimes]) -> Precision:
    """bf16 where it gains enough on every worker, as all wait for the slowest; else fp32."""
    least = min(times, key=lambda one: one.gain)
    name = "bf16" if least.gain >= LEAST_GAIN else "fp32"
    where = f" on {least.node}, the least of {len(times)} nodes" if len(times) > 1 else ""
    reason = (
        f"measured: a layer of width {least.width} takes {least.fp32:.2f} ms in fp32 and {least.bf16:.2f} ms in bf16"
        f"{where} ({least.gain:.2f} times as fast; from {LEAST_GAIN:g} on it is bf16)"
    )
    return Precision(name, reason, tuple(times))


def settled(config: TrainConfig, width: int, *, use_gpu: bool) -> Precision | None:
    """The precision where nothing needs to be measured; None where it does.

    Args:
        width: the model's hidden size.
    """
    if config.training.precision != "auto":
        return Precision(config.training.precision, "training.precision says so")
    if use_gpu:
        return Precision("auto", "bf16 on a GPU, but for parallel.zero_stage 0")
    if config.parallel.zero_stage == 0:
        return Precision("fp32", "parallel.zero_stage is 0, under which nothing keeps fp32 master weights")
    if width <= NARROW:
        return Precision("fp32", f"width {width}: matrices of up to {NARROW} columns gain nothing in bf16")
    return None


def with_precision(config: TrainConfig, precision: Precision) -> TrainConfig:
    """A copy of ``config`` with the decision in place of ``auto``."""
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": precision.name})})


def width_of(model_config: Any) -> int:
    """The hidden size, under the name that all families of transformers answer to."""
    return int(getattr(model_config, "hidden_size", 0))


def measure(width: int, tokens: int, threads: int) -> LayerTimes:
    """Measure a layer on this machine in both precisions; takes under a second on any CPU.

    Args:
        width: the model's hidden size.
        tokens: of a worker's micro-batch, at most.
        threads: what a worker computes with.
    """
    import socket

    import torch

    before = torch.get_num_threads()
    rows, width = max(1, min(tokens, MOST_ROWS)), min(width, MOST_WIDTH)
    torch.set_num_threads(threads)
    try:
        first = min(rows, FIRST_ROWS)
        fp32, bf16 = _milliseconds(first, width, 3)
        if rows > first and bf16 < HOPELESS * fp32:
            first = rows
            fp32, bf16 = _milliseconds(rows, width, REPEATS)
    finally:
        torch.set_num_threads(before)
    return LayerTimes(socket.gethostname(), first, width, round(fp32, 4), round(bf16, 4))


def _milliseconds(rows: int, width: int, repeats: int) -> tuple[float, float]:
    """Medians of at least two and at most ``repeats`` calls in fp32 and bf16, in turn, after one each to warm up."""
    import torch

    layers = [_layer(rows, width, dtype) for dtype in (torch.float32, torch.bfloat16)]
    times: list[list[float]] = [[], []]
    ends = time.perf_counter() + SECONDS
    for layer in layers:
        layer()
    while len(times[1]) < 2 or (len(times[1]) < repeats and time.perf_counter() < ends):
        for found, layer in zip(times, layers, strict=True):
            began = time.perf_counter()
            layer()
            found.append(1e3 * (time.perf_counter() - began))
    fp32, bf16 = (max(statistics.median(found), 1e-6) for found in times)
    return fp32, bf16


def _layer(rows: int, width: int, dtype: Any) -> Callable[[], Any]:
    """A feed-forward layer with its norm, and its gradients."""
    import torch
    from torch.nn.functional import gelu, layer_norm, linear

    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Any:
        drawn = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return drawn.to(dtype).requires_grad_()

    inputs, scale, up, down = made(rows, width), made(width), made(4 * width, width), made(width, 4 * width)
    gradient = torch.ones(rows, width, dtype=dtype)

    def run() -> Any:
        hidden = linear(layer_norm(inputs, (width,), scale), up)
        outputs = inputs + linear(gelu(hidden, approximate="tanh"), down)
        return torch.autograd.grad(outputs, (inputs, scale, up, down), gradient)

    return run
