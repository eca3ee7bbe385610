"""Environment variables of the processes that compute."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from raylm import telemetry

# Large activations are freed and taken again each step. By default glibc returns them to the kernel in between and pays
# for the page faults (https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html); told to keep
# them, its heap breaks up into holes and grows to twice of what is in use. jemalloc does not, and is told to keep what
# was used within a minute, large pieces too, which it would return at once (https://jemalloc.net/jemalloc.3.html).
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
JEMALLOC_SETTINGS = "oversize_threshold:0,dirty_decay_ms:60000,muzzy_decay_ms:60000"

# Keys of a server's clients, separated by commas.
API_KEYS_VARIABLE = "RAYLM_API_KEYS"


def inherited_environment() -> dict[str, str]:
    """This process's variables for one that it starts, without the API keys: only the start of a server needs them."""
    return {name: value for name, value in os.environ.items() if name != API_KEYS_VARIABLE}


@contextlib.contextmanager
def without_api_keys() -> Iterator[None]:
    """:func:`inherited_environment` for what a library starts in the block."""
    keys = os.environ.pop(API_KEYS_VARIABLE, None)
    try:
        yield
    finally:
        if keys is not None:
            os.environ[API_KEYS_VARIABLE] = keys


@contextlib.contextmanager
def default_environment(values: dict[str, str]) -> Iterator[None]:
    """Variables within the block; what is set already stays."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def worker_environment(cpus: float) -> dict[str, str]:
    """Environment variables of a process that computes with ``cpus`` CPUs."""
    threads = {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false"}
    return {**threads, **MALLOC_ENVIRONMENT, **telemetry.VARIABLES}


def training_environment(cpus: float) -> dict[str, str]:
    """Environment variables of a process that trains on ``cpus`` CPUs: with the jemalloc that comes with Ray.

    A preload of the user's own stays alone. Where a node lacks the library, glibc's settings hold.
    """
    environment = worker_environment(cpus)
    spec = importlib.util.find_spec("ray")
    library = Path(spec.origin).parent / "core" / "libjemalloc.so" if spec and spec.origin else None
    if library is not None and library.is_file() and "LD_PRELOAD" not in os.environ:
        environment["LD_PRELOAD"] = str(library)
        environment["MALLOC_CONF"] = os.environ.get("MALLOC_CONF", JEMALLOC_SETTINGS)
    return environment
