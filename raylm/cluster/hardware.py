"""The GPUs that raylm knows: memory, peak and links of each, from NVIDIA's data sheets. Needs no torch.

Sources, each by the name of the document on nvidia.com: data sheets "Tesla K80", "Tesla P4", "Tesla P100", "V100",
"T4", "L4", "A10", "L40S", "A100", "H100", "H200" and "DGX B200". Peaks are those of dense matrix products; the sheets
print twice as much where they count sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        gib: memory, GiB; the smallest that is sold under the name.
        peak: dense matrix products in bf16 with fp32 sums (T4: fp16, it has no bf16), FLOP/s; None where training's
            utilisation is not told by it.
    """

    gib: int
    peak: float | None = None


# By the names that Ray gives them (ray.util.accelerators).
GPUS = {
    "K80": Gpu(12), "P4": Gpu(8), "P100": Gpu(12), "V100": Gpu(16), "T4": Gpu(16, 65e12), "L4": Gpu(24, 121e12),
    "A10G": Gpu(24, 125e12), "L40S": Gpu(48, 362e12), "A100": Gpu(40, 312e12), "A100-40G": Gpu(40, 312e12),
    "A100-80G": Gpu(80, 312e12), "H100": Gpu(80, 989e12), "H200": Gpu(141, 989e12), "B200": Gpu(180),
}  # fmt: skip
