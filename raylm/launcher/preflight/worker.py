"""What a worker gets out of its hardware while all others compute as well. It travels as the probe does.

A model's pass is made of four kinds of work (:mod:`raylm.parallel.plan.timing`), and each is timed by itself, forward
and backward, in sizes of a small model: products with weights, attention, operators that go through memory, and small
operators, of which only the start counts. Rates are floating-point operations or bytes a second.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Rounds of each kind go on for this long: a machine that is shared gives and takes within a second.
SECONDS = 2.0
ROWS, WIDTH, INNER = 1024, 512, 1536
HEADS, TIME, HEAD_WIDTH = 8, 256, 64
SMALL = 64
SIZES = (1 << 10, 1 << 22)
ROUNDS = 60


class WorkerProbe:
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

    def sums(self, rank: int, workers: int, store: tuple[str, int], address: str) -> dict[str, float]:
        """Seconds of a sum over ``workers`` of these processes, by its size in bytes.

        Args:
            store: address and port of the first one's store.
            address: of this node, which gloo is to listen at.
        """
        import datetime

        import psutil
        import torch
        import torch.distributed as dist

        for name, addresses in psutil.net_if_addrs().items():
            if any(one.address == address for one in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name
        where = f"tcp://{store[0]}:{store[1]}"
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=workers, timeout=limit)
        try:
            return {str(size): _sum_seconds(torch.ones(size // 4)) for size in SIZES}
        finally:
            dist.destroy_process_group()

    def free_port(self) -> int:
        """A port that nobody has."""
        import socket

        with socket.create_server(("", 0)) as server:
            return server.getsockname()[1]


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


def _sum_seconds(tensor: Any) -> float:
    import torch.distributed as dist

    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - began)
    return statistics.fmean(times[1:])


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
