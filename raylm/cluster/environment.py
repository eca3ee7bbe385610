"""Environment variables of the processes that compute."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Large activations are freed and taken again each step. By default glibc returns them to the kernel in between and pays
# for the page faults (https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html); told to keep
# them, its heap breaks up into holes and grows to twice of what is in use. jemalloc does neither.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


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
