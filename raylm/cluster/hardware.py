"""The hardware that raylm knows: GPUs by their data sheets, machines of two clouds, and what training gets out of them.

Needs no torch. :class:`Figures` is what a plan reckons with: :func:`gpu_figures` makes it from a data sheet, and
:meth:`Figures.measured` puts what was measured in place of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from raylm.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by NVIDIA's data sheet of it: the SXM module where there is one (B200: HGX B200, by GPU).

    Attributes:
        gib: memory, GiB; the smallest that is sold under the name.
        peak: dense matrix products in bf16 (T4: in fp16), FLOP/s; None where it is measured instead. A sheet that
            counts sparsity prints twice as much.
        memory: bandwidth of its memory, bytes/s.
        link: to other GPUs of the node in one direction, bytes/s: half of what the sheet gives for NVLink or PCIe.
    """

    gib: int
    peak: float | None = None
    memory: float | None = None
    link: float | None = None


# By the names that Ray gives them (ray.util.accelerators), and A10, which Ray does not name.
GPUS = {
    "K80": Gpu(12), "P4": Gpu(8), "P100": Gpu(12), "V100": Gpu(16, None, 0.9e12, 150e9),
    "T4": Gpu(16, 65e12, 0.32e12, 16e9), "L4": Gpu(24, 121e12, 0.3e12, 32e9), "A10": Gpu(24, 125e12, 0.6e12, 32e9),
    "A10G": Gpu(24, 125e12, 0.6e12, 32e9), "L40S": Gpu(48, 362e12, 0.864e12, 32e9),
    "A100": Gpu(40, 312e12, 1.555e12, 300e9), "A100-40G": Gpu(40, 312e12, 1.555e12, 300e9),
    "A100-80G": Gpu(80, 312e12, 2.039e12, 300e9), "H100": Gpu(80, 989e12, 3.35e12, 450e9),
    "H200": Gpu(141, 989e12, 4.8e12, 450e9), "B200": Gpu(180, 2250e12, 7.7e12, 900e9),
}  # fmt: skip


def gpu_kind(name: str) -> str | None:
    """The kind, a key of :data:`GPUS`, of a GPU that CUDA, Kubernetes or a cloud calls ``name``; None if not known.

    Such names are "NVIDIA A100-SXM4-80GB", "NVIDIA-H100-80GB-HBM3" and "nvidia-tesla-v100".
    """
    # The longest name first: "A100" contains "A10", and is not contained in "A1000".
    upper = name.upper()
    found = (kind for kind in sorted(GPUS, key=len, reverse=True) if re.search(rf"{kind}(?![0-9])", upper))
    kind = next(found, None)
    return "A100-80G" if kind == "A100" and "80G" in upper else kind


def known_peak(device_name: str) -> float | None:
    """Peak of the GPU that CUDA calls ``device_name`` ("NVIDIA A100-SXM4-40GB"), FLOP/s; None if it is not known."""
    kind = gpu_kind(device_name)
    return None if kind is None else GPUS[kind].peak


# What training gets of a data sheet: of the peak, in products with weights and in attention, and of links; and how much
# of the traffic between replicas adds to a step although computation hides it. Fitted to every second one of 26
# published step times on A100 and H100 (tests/benchmarks/published_steps.py --fit; cluster/SIZING.md). Memory came out
# as its sheet says.
MATRIX_SHARE, ATTENTION_SHARE, LINK_SHARE, EXPOSED = 0.63, 0.14, 0.89, 0.5
# What nodes of GPUs have between them where nothing says it: 400 Gbit/s.
NETWORK = 50e9
# Of a collective of NCCL within a node, and of starting a kernel from PyTorch; round figures.
_COLLECTIVE_SECONDS, _LAUNCH_SECONDS = 20e-6, 5e-6


@dataclass(frozen=True)
class Figures:
    """What a worker gets out of its hardware in training: shares of a data sheet, or as measured.

    Attributes:
        kind: of GPU, a key of :data:`GPUS`; or "CPU".
        matrix_flops: products of matrices as large as a model's, FLOP/s.
        attention_flops: products in attention, FLOP/s.
        memory_bandwidth: bytes/s that operators make.
        near_bandwidth: bytes/s to another worker of the node, in one direction.
        far_bandwidth: bytes/s to other nodes, each worker's share of what its node has.
        collective_seconds: what a collective takes however little it sends.
        launch_seconds: what starting an operator takes.
        exposed: share of the time of data-parallel traffic that computation does not hide; 1 where it hides nothing.
        peak_flops: of the data sheet, which model FLOPs utilisation is measured against; None if not known.
        source: where the figures come from.
    """

    kind: str
    matrix_flops: float
    attention_flops: float
    memory_bandwidth: float
    near_bandwidth: float
    far_bandwidth: float
    collective_seconds: float
    launch_seconds: float
    exposed: float
    peak_flops: float | None = None
    source: str = "data sheet"

    def measured(self, values: Mapping[str, object], origin: str) -> Figures:
        """The figures with measured ones in their place.

        Args:
            values: numbers by the names of the attributes, as reached, not as a data sheet has them. With
                ``matrix_flops`` alone, attention follows it.
            origin: file that they are from.

        Raises:
            UserError: a name that is none, or a value that is no number above 0.
        """
        names = [field.name for field in fields(self) if field.type == "float"]
        for name, value in values.items():
            if name not in names:
                raise UserError(f"{origin}: found '{name}', allowed: {', '.join(names)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
                raise UserError(f"{origin}: {name}: found {str(value)[:100]!r}, allowed: a number above 0")
        found = {name: float(value) for name, value in values.items()}  # type: ignore[arg-type]
        if "matrix_flops" in found:
            found.setdefault("attention_flops", found["matrix_flops"] * self.attention_flops / self.matrix_flops)
        return replace(self, **found, source=f"{self.source}; {', '.join(values)} from {origin}")  # type: ignore[arg-type]


# A core, in round figures that rank layouts.
CPU = Figures("CPU", 40e9, 40e9, 10e9, 1e9, 0.5e9, 100e-6, 10e-6, exposed=1.0, source="round figures")


def gpu_figures(kind: str, workers_per_node: int = 8, network: float = NETWORK, key: str = "GPU") -> Figures:
    """What training gets out of a ``kind`` of GPU by its data sheet.

    Args:
        network: between nodes, bytes/s of a node, which its workers share.
        key: what names the kind, for the error.

    Raises:
        UserError: there is no such kind, or it has no figures for bf16.
    """
    gpu = GPUS.get(kind)
    if gpu is None or gpu.peak is None or gpu.memory is None or gpu.link is None:
        allowed = ", ".join(name for name, known in GPUS.items() if known.peak is not None)
        raise UserError(f"{key}: found {kind[:100]}, allowed: a GPU with figures for bf16: {allowed}")
    return Figures(
        kind,
        matrix_flops=MATRIX_SHARE * gpu.peak,
        attention_flops=ATTENTION_SHARE * gpu.peak,
        memory_bandwidth=gpu.memory,
        near_bandwidth=LINK_SHARE * gpu.link,
        far_bandwidth=LINK_SHARE * network / workers_per_node,
        collective_seconds=_COLLECTIVE_SECONDS,
        launch_seconds=_LAUNCH_SECONDS,
        exposed=EXPOSED,
        peak_flops=gpu.peak,
    )


@dataclass(frozen=True)
class Instance:
    """A machine type of a cloud: its GPUs, virtual CPUs, memory in GiB, and network in Gbit/s."""

    kind: str
    gpus: int
    cpus: int
    gib: int
    gbits: float


# docs.aws.amazon.com/ec2/latest/instancetypes/ac.html; docs.cloud.google.com/compute/docs/gpus/gpu-network-bandwidth
INSTANCES = {
    "p3.2xlarge": Instance("V100", 1, 8, 61, 10), "p3.16xlarge": Instance("V100", 8, 64, 488, 25),
    "p4d.24xlarge": Instance("A100-40G", 8, 96, 1152, 400), "p4de.24xlarge": Instance("A100-80G", 8, 96, 1152, 400),
    "p5.4xlarge": Instance("H100", 1, 16, 256, 100), "p5.48xlarge": Instance("H100", 8, 192, 2048, 3200),
    "p5e.48xlarge": Instance("H200", 8, 192, 2048, 3200), "p5en.48xlarge": Instance("H200", 8, 192, 2048, 3200),
    "p6-b200.48xlarge": Instance("B200", 8, 192, 2048, 3200),
    "g4dn.xlarge": Instance("T4", 1, 4, 16, 25), "g4dn.12xlarge": Instance("T4", 4, 48, 192, 50),
    "g5.xlarge": Instance("A10G", 1, 4, 16, 10), "g5.12xlarge": Instance("A10G", 4, 48, 192, 40),
    "g5.48xlarge": Instance("A10G", 8, 192, 768, 100),
    "g6.xlarge": Instance("L4", 1, 4, 16, 10), "g6.12xlarge": Instance("L4", 4, 48, 192, 40),
    "g6.48xlarge": Instance("L4", 8, 192, 768, 100),
    "g6e.xlarge": Instance("L40S", 1, 4, 32, 20), "g6e.12xlarge": Instance("L40S", 4, 48, 384, 100),
    "g6e.48xlarge": Instance("L40S", 8, 192, 1536, 400),
    "a2-highgpu-1g": Instance("A100-40G", 1, 12, 85, 24), "a2-highgpu-2g": Instance("A100-40G", 2, 24, 170, 32),
    "a2-highgpu-4g": Instance("A100-40G", 4, 48, 340, 50), "a2-highgpu-8g": Instance("A100-40G", 8, 96, 680, 100),
    "a2-ultragpu-1g": Instance("A100-80G", 1, 12, 170, 24), "a2-ultragpu-8g": Instance("A100-80G", 8, 96, 1360, 100),
    "a3-highgpu-8g": Instance("H100", 8, 208, 1872, 1000), "a3-megagpu-8g": Instance("H100", 8, 208, 1872, 1800),
    "a3-ultragpu-8g": Instance("H200", 8, 224, 2952, 3600), "a4-highgpu-8g": Instance("B200", 8, 224, 3968, 3600),
    "g2-standard-4": Instance("L4", 1, 4, 16, 10), "g2-standard-12": Instance("L4", 1, 12, 48, 16),
    "g2-standard-24": Instance("L4", 2, 24, 96, 32), "g2-standard-48": Instance("L4", 4, 48, 192, 50),
    "g2-standard-96": Instance("L4", 8, 96, 384, 100),
}  # fmt: skip
