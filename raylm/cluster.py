"""Joining the Ray cluster that a stage runs on, or starting one on this machine.

A stage joins the cluster in ``RAY_ADDRESS`` (set by ``ray job submit`` too), else it starts Ray locally and stops it
at the end. Ray is imported only inside the functions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from raylm.errors import RunFailure, UserError
from raylm.parallel.capacity import Capacity, Node
from raylm.progress import Activity

# Ray itself tries for two minutes to reach a cluster that is not there.
CONNECT_SECONDS = 10.0

# Large activations are freed and taken again each step. By default glibc returns them to the kernel in between and pays
# for the page faults (https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html); told to keep
# them, its heap breaks up into holes and grows to twice of what is in use. jemalloc does neither.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


# Ray's names of GPUs (ray.util.accelerators) -> GiB of memory, the smallest that is sold under the name.
GPU_MEMORY = {
    "K80": 12, "P4": 8, "P100": 12, "V100": 16, "T4": 16, "L4": 24, "A10G": 24, "L40S": 48, "A100": 40, "A100-40G": 40,
    "A100-80G": 80, "H100": 80, "H200": 141, "B200": 180,
}  # fmt: skip


@contextlib.contextmanager
def ray_session(*, dashboard: bool = False) -> Iterator[None]:
    """Hold a connection to Ray; a local instance ends with the block, a joined cluster stays.

    Args:
        dashboard: start the dashboard of a local instance. Ray Tune needs it: without it stopped trials leak their
            placement groups.

    Raises:
        UserError: ``RAY_ADDRESS`` names a cluster that does not answer.
        RunFailure: Ray could not be started.
    """
    if _joined():
        yield
        return
    with Activity("joining the Ray cluster" if os.environ.get("RAY_ADDRESS") else "starting Ray"):
        _start_ray(dashboard)
    try:
        yield
    finally:
        import ray

        ray.shutdown()


def _joined() -> bool:
    """Whether this process is connected to Ray; without importing Ray where it cannot be."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _start_ray(dashboard: bool) -> None:
    import ray

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
    else:
        # A local instance that nobody else can reach needs no token, and must not write one to the user's home.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": dashboard, "address": "local"}
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise UserError(f"{_no_cluster(address or 'local')}: {error}") from None
    except Exception as error:  # Ray raises its bare class where a process of it does not come up in time
        ray.shutdown()
        raise RunFailure(f"Ray did not start: {str(error).splitlines()[0]}") from error


def _check_address(address: str) -> None:
    """Refuse the ``HOST:PORT`` of a cluster, with or without ``ray://``, where nothing listens."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{_no_cluster(address)}: {error}") from None


def _no_cluster(address: str) -> str:
    return f"RAY_ADDRESS: found {address}, allowed: the address of a running cluster, or nothing to start Ray here"


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster: ``{"CPU": 8.0, "GPU": 0.0}``."""
    import ray

    total = ray.cluster_resources()
    return {"CPU": total.get("CPU", 0.0), "GPU": total.get("GPU", 0.0)}


def worker_environment(cpus: float) -> dict[str, str]:
    """Environment variables of a process that computes with ``cpus`` CPUs."""
    return {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false", **MALLOC_ENVIRONMENT}


def training_environment(cpus: float) -> dict[str, str]:
    """Environment variables of a process that trains on ``cpus`` CPUs: with the jemalloc that comes with Ray.

    A preload of the user's own stays alone. Where a node lacks the library, glibc's settings hold.
    """
    environment = worker_environment(cpus)
    spec = importlib.util.find_spec("ray")
    library = Path(spec.origin).parent / "core" / "libjemalloc.so" if spec and spec.origin else None
    if library is not None and library.is_file() and "LD_PRELOAD" not in os.environ:
        environment["LD_PRELOAD"] = str(library)
    return environment


def cluster_capacity() -> Capacity:
    """The nodes of the joined cluster: CPUs, GPUs, and memory as far as it is known."""
    import ray

    nodes = []
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"] and resources.get("CPU", 0) > 0:
            gpus = resources.get("GPU", 0.0)
            nodes.append(
                Node(resources["CPU"], gpus, resources.get("memory"), _gpu_memory(resources) if gpus else None)
            )
    return Capacity(tuple(nodes))


def _gpu_memory(resources: dict[str, float]) -> float | None:
    """Of a GPU of a node, by the name of it that Ray gives; None if it is not known."""
    named = (name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:"))
    return next((GPU_MEMORY[name] * 2.0**30 for name in named if name in GPU_MEMORY), None)
