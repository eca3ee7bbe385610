"""What runs on each node. It travels as it is and needs nothing of raylm there: a node may lack it, or have another.

Times are in seconds, sizes in bytes, rates in bytes or floating-point operations a second.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

PACKAGES = ("raylm", "ray", "torch", "deepspeed", "transformers", "numpy", "openvino", "vllm")
# A second each is enough for a rate, on a slow link too.
RATE_SECONDS = 1.0
BLOCK = 1 << 18
ECHOES = 50
MATRIX = 2048
_ECHO, _SINK = b"e", b"s"


class NodeProbe:
    """One node, looked at from a process on it."""

    def facts(self, storage: str | None, files: str) -> dict[str, Any]:
        """What the node is.

        Args:
            storage: folder that the nodes should share.
            files: where Ray writes on this node.
        """
        return {
            "python": ".".join(map(str, sys.version_info[:3])),
            "packages": _versions(),
            "cuda": _cuda(),
            "gpus": _gpus(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu": _cpu_model(),
            "memory": _memory(),
            "disk": _space(files),
            "shared_memory": _space("/dev/shm"),
            "storage": _space(storage) if storage else None,
            "open_files": _open_files(),
            "token": os.environ.get("RAY_AUTH_MODE") == "token",
        }

    def now(self) -> float:
        """Its clock."""
        return time.time()

    def write(self, storage: str, name: str) -> str:
        """Leave a file in ``storage``; why that failed, or nothing."""
        try:
            Path(storage).mkdir(parents=True, exist_ok=True)
            Path(storage, name).write_text(name)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def missing(self, storage: str, names: list[str]) -> list[str]:
        """Those of the files that cannot be read here; waits a little, as NFS may be late."""
        end = time.monotonic() + 5.0
        while True:
            left = []
            for name in names:
                try:
                    if Path(storage, name).read_text() != name:
                        left.append(name)
                except OSError:
                    left.append(name)
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.5)

    def remove(self, storage: str, names: list[str]) -> None:
        """Take the files away."""
        for name in names:
            with contextlib.suppress(OSError):
                Path(storage, name).unlink()

    def listen(self) -> int:
        """Take connections from now on; the port."""
        server = socket.create_server(("", 0))
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        return server.getsockname()[1]

    def link(self, address: str, port: int, seconds: float) -> dict[str, Any]:
        """Latency of a TCP connection to another node; ``error`` where there is none within ``seconds``."""
        try:
            with socket.create_connection((address, port), timeout=seconds) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return {"latency": _latency(connection)}
        except OSError as error:
            return {"error": error.strerror or str(error)}

    def rate(self, address: str, port: int, seconds: float) -> float:
        """Bytes a second that another node takes from this one."""
        with socket.create_connection((address, port), timeout=seconds) as connection:
            connection.sendall(_SINK)
            block, sent, began = bytes(BLOCK), 0, time.monotonic()
            while (elapsed := time.monotonic() - began) < RATE_SECONDS:
                connection.sendall(block)
                sent += BLOCK
            # The other side answers when all has come.
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(seconds + 30.0)
            connection.recv(1)
            elapsed = time.monotonic() - began
        return sent / elapsed

    def products(self) -> dict[str, float]:
        """Floating-point operations a second in matrix products by number format, with all CPUs or one GPU."""
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        return {name: _product_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}

    def free_port(self) -> int:
        """A port that nobody has."""
        with socket.create_server(("", 0)) as server:
            return server.getsockname()[1]

    def all_reduce(
        self, rank: int, members: int, store: tuple[str, int], address: str, sizes: list[int], backend: str, rounds: int
    ) -> dict[int, list[float]]:
        """Seconds of sums over all ``members``, by their size in bytes; the first of ``rounds`` does not count.

        Args:
            store: address and port of the first rank's store.
            address: this node's own, which gloo is to listen at.
        """
        import datetime

        import torch
        import torch.distributed as dist

        if (interface := _interface(address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group(
            backend, init_method=f"tcp://{store[0]}:{store[1]}", rank=rank, world_size=members, timeout=limit
        )
        try:
            device = "cuda" if backend == "nccl" else "cpu"
            return {size: _sum_seconds(torch.ones(size // 4, device=device), rounds) for size in sizes}
        finally:
            dist.destroy_process_group()


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cuda() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def _gpus() -> list[dict[str, Any]]:
    """By NVIDIA's management library; none where it is not there."""
    try:
        import pynvml
    except ImportError:
        try:
            from ray._private.thirdparty import pynvml
        except ImportError:
            return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
        found.append(
            {"name": name if isinstance(name, str) else name.decode(), "memory": memory.total, "used": memory.used}
        )
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def _space(place: str) -> dict[str, int] | None:
    """Bytes of the disk that holds ``place``; None where it is not there."""
    path = Path(place)
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    if existing is None:
        return None
    usage = shutil.disk_usage(existing)
    return {"free": usage.free, "total": usage.total}


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _interface(address: str) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None


def _serve(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = connection.recv(1)
        while data := connection.recv(BLOCK):
            if kind == _ECHO:
                connection.sendall(data)
        connection.sendall(b".")


def _latency(connection: socket.socket) -> float:
    connection.sendall(_ECHO)
    times = []
    for _ in range(ECHOES):
        began = time.perf_counter()
        connection.sendall(b".")
        connection.recv(1)
        times.append(time.perf_counter() - began)
    # There and back.
    return statistics.median(times) / 2


def _product_rate(number_format: Any) -> float:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 4 * MATRIX if device == "cuda" else MATRIX
    matrix = torch.ones(side, side, dtype=number_format, device=device)

    def run() -> float:
        began = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    # A format that the CPU lacks takes a hundred times as long: one is enough then.
    times = [run()]
    while len(times) < 5 and sum(times) < RATE_SECONDS:
        times.append(run())
    return 2 * side**3 / statistics.median(times[1:] or times)


def _sum_seconds(tensor: Any, rounds: int) -> list[float]:
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]
