"""The hardware that raylm knows: memory and peak of each GPU, and how fast kinds of workers train. Needs no torch.

Memory and peaks are from NVIDIA's data sheets, one for each product (for B200, that of DGX B200, by GPU). Peaks are
those of dense matrix products; where a sheet counts sparsity it prints twice as much.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        gib: memory, GiB; the smallest that is sold under the name.
        peak: dense matrix products in bf16 (T4: in fp16), FLOP/s; None where it is measured instead.
    """

    gib: int
    peak: float | None = None


_H100_PEAK = 989e12
# By the names that Ray gives them (ray.util.accelerators), and A10, which Ray does not name.
GPUS = {
    "K80": Gpu(12), "P4": Gpu(8), "P100": Gpu(12), "V100": Gpu(16), "T4": Gpu(16, 65e12), "L4": Gpu(24, 121e12),
    "A10": Gpu(24, 125e12), "A10G": Gpu(24, 125e12), "L40S": Gpu(48, 362e12), "A100": Gpu(40, 312e12),
    "A100-40G": Gpu(40, 312e12), "A100-80G": Gpu(80, 312e12), "H100": Gpu(80, _H100_PEAK),
    "H200": Gpu(141, _H100_PEAK), "B200": Gpu(180),
}  # fmt: skip


def known_peak(device_name: str) -> float | None:
    """Peak of the GPU that CUDA calls ``device_name`` ("NVIDIA A100-SXM4-40GB"), FLOP/s; None if it is not known."""
    # The longest name first: "A100" contains "A10".
    names = sorted((name for name, gpu in GPUS.items() if gpu.peak is not None), key=len, reverse=True)
    return next((GPUS[name].peak for name in names if name in device_name), None)


@dataclass(frozen=True)
class Machine:
    """Round figures of a kind of worker.

    Attributes:
        flops: matrix products that training reaches, FLOP/s.
        near: bytes/s to another worker of the node.
        far: bytes/s to other nodes, each worker's share of what its node has.
        half_full: tokens of a micro-batch at which a worker reaches half of its speed.
    """

    flops: float
    near: float
    far: float
    half_full: float


# A core; and an H100 at two fifths of its data sheet, with NVLink at less than half of its, and 400 Gbit/s for eight.
CPU = Machine(flops=40e9, near=1e9, far=0.5e9, half_full=16)
GPU = Machine(flops=0.4 * _H100_PEAK, near=200e9, far=5e9, half_full=256)
