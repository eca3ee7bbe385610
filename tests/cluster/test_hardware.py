"""What raylm knows of GPUs, by the names that Ray and CUDA give them."""

from __future__ import annotations

import pytest

from raylm.cluster.hardware import known_peak


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_peak_is_found_by_the_devices_name(device: str, peak: float | None) -> None:
    assert known_peak(device) == peak
