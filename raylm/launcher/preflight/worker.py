"""What a worker gets out of its hardware while all others compute as well. It travels as the probe does.

A model's pass is made of four kinds of work (:mod:`raylm.parallel.plan.timing`), and each is timed by itself, forward
and backward, in sizes of a small model: products with weights, attention, operators that go through memory, and small
operators, of which only the start counts. Rates are floating-point operations or bytes a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from raylm.launcher.preflight.probe import NodeProbe

# Rounds of each kind go on for this long: a machine that is shared gives and takes within a second.
SECONDS = 2.0
ROWS, WIDTH, INNER = 1024, 512, 1536
HEADS, TIME, HEAD_WIDTH = 8, 256, 64
SMALL = 64


class WorkerProbe(NodeProbe):
    """A process like one rank's, with as many threads."""

    def start(self, threads: int) -> None:
        """Load what is timed, once."""
        import torch

        torch.set_num_threads(threads)
        for one in (_products, _attention, _elements, _small):
            one()()

    def rates(self) -> dict[str, float]:
        """By the names of a plan's figures; call it on all workers at once."""
        products, attention = 3 * 2.0 * ROWS * WIDTH * INNER, 7 * 2.0 * HEADS * TIME * TIME * HEAD_WIDTH / 2 * 4
        # As torch makes them: five large tensors forward, and eleven backward.
        elements = 16 * 4.0 * ROWS * INNER
        return {
            "matrix_flops": products / _seconds(_products()),
            "attention_flops": attention / _seconds(_attention()),
            "memory_bandwidth": elements / _seconds(_elements()),
            "launch_seconds": _seconds(_small()) / SMALL,
        }


def _seconds(run: Callable[[], None]) -> float:
    """The mean of as many runs as take :data:`SECONDS`, after one that does not count."""
    run()
    times: list[float] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    # A step sees the mean of a CPU that others have a share of.
    return statistics.fmean(times)


def _products() -> Callable[[], None]:
    import torch
    from torch import nn

    layer = nn.Linear(WIDTH, INNER, bias=False)
    rows = torch.randn(ROWS, WIDTH, requires_grad=True)

    def run() -> None:
        made = layer(rows)
        made.backward(made.detach())

    return run


def _attention() -> Callable[[], None]:
    import torch
    from torch.nn import functional

    queries, keys, values = (torch.randn(4, HEADS, TIME, HEAD_WIDTH, requires_grad=True) for _ in range(3))

    def run() -> None:
        made = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        made.backward(made.detach())

    return run


def _elements() -> Callable[[], None]:
    """A gated activation and a root mean square, as Llama has them."""
    import torch
    from torch.nn import functional

    first, second = (torch.randn(ROWS, INNER, requires_grad=True) for _ in range(2))

    def run() -> None:
        made = functional.silu(first) * second
        scaled = made * torch.rsqrt(made.square().mean(-1, keepdim=True) + 1e-6)
        (scaled + first).backward(first.detach())
        first.grad = second.grad = None

    return run


def _small() -> Callable[[], None]:
    import torch

    one = torch.ones(16, requires_grad=True)

    def run() -> None:
        made = one
        for _ in range(SMALL // 2):
            made = made * 0.5
        made.backward(torch.ones(16))
        one.grad = None

    return run
