"""Joining the Ray cluster that a stage runs on, or starting one on this machine.

A stage joins the cluster in ``RAY_ADDRESS`` (set by ``ray job submit`` too), else it starts Ray locally and stops it
at the end. Ray is imported only inside the functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

# Large activations are freed and taken again each step; by default glibc returns them to the kernel in between and
# pays for the page faults (https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html).
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@contextlib.contextmanager
def ray_session(*, dashboard: bool = False) -> Iterator[None]:
    """Hold a connection to Ray; a local instance ends with the block, a joined cluster stays.

    Args:
        dashboard: start the dashboard of a local instance. Ray Tune needs it: without it stopped trials leak their
            placement groups.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not os.environ.get("RAY_ADDRESS"):
        # A local instance that nobody else can reach needs no token, and must not write one to the user's home.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": dashboard, "address": "local"}
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster: ``{"CPU": 8.0, "GPU": 0.0}``."""
    import ray

    total = ray.cluster_resources()
    return {"CPU": total.get("CPU", 0.0), "GPU": total.get("GPU", 0.0)}


def worker_environment(cpus: float) -> dict[str, str]:
    """Environment variables of a process that computes with ``cpus`` CPUs."""
    return {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false", **MALLOC_ENVIRONMENT}
