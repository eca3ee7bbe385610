"""Where the ranks of a run are: which node and process each is, whether a layout may be spread so, and what they left.

In: nothing but the worker's own process; for logs, the places of ranks that failed. Out: places, and copies of the log
files of failed ranks under ``<run>/logs/``, as the node or the cluster may be gone soon.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.errors import RunFailure

LOGS = "logs"
# Of each log file the last part, and of no more ranks of one failure.
MOST_LOG_BYTES = 1 << 20
MOST_RANKS = 8
ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 2.0
MOST_CONNECTIONS = 64


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        node: Ray's id of its node.
        host: name and address of the node.
        worker: Ray's id of the process.
        pid: the operating system's.
        logs: directory of Ray's log files on that node.
    """

    node: str
    host: str
    worker: str
    pid: int
    logs: str


@dataclass(frozen=True)
class Loss:
    """A rank that failed.

    Attributes:
        generation: token of the start of the workers that it belonged to.
        reason: what Ray or the rank itself says of it.
    """

    generation: str
    rank: int
    place: Place | None
    reason: str

    @property
    def folder(self) -> str:
        """Where its logs are copied to, in the run directory."""
        return f"{LOGS}/{self.generation}-rank-{self.rank:05d}"


def place_here() -> Place:
    """This worker's."""
    import ray

    context = ray.get_runtime_context()
    address = ray.util.get_node_ip_address()
    host = f"{socket.gethostname()} ({address})"
    logs = ray._private.worker._global_node.get_logs_dir_path()
    return Place(context.get_node_id(), host, context.get_worker_id(), os.getpid(), logs)


def check_tensor_groups(places: Sequence[Place], tensor: int) -> None:
    """Refuse a layout whose tensor-parallel ranks are on several nodes: each layer would wait for the network.

    Args:
        places: by rank; tensor-parallel ranks follow each other.

    Raises:
        RunFailure: names the ranks and the nodes.
    """
    for first in range(0, len(places), tensor):
        group = places[first : first + tensor]
        if len({place.node for place in group}) > 1:
            hosts = ", ".join(dict.fromkeys(f"{place.host}" for place in group))
            raise RunFailure(
                f"parallel.tensor: found {tensor}, but ranks {first} to {first + tensor - 1}, which share every layer, "
                f"are on several nodes ({hosts}); allowed: a number of workers on each node that {tensor} divides "
                "(resources.cpus_per_worker decides it on CPUs), or a smaller parallel.tensor"
            )


def gone_nodes(places: Sequence[Place]) -> set[str]:
    """The ids of those nodes that the cluster has lost."""
    import ray

    wanted = {place.node for place in places}
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in wanted]
    return wanted - answering(alive)


def answering(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """The ids of those ``nodes``, entries of ``ray.nodes()``, where Ray's own process takes connections.

    The cluster calls a node alive until it has missed its health checks for some 15 s, and in that time workers may
    have started again on a spare one.
    """

    def answers(node: Mapping[str, Any]) -> bool:
        try:
            address = (node["NodeManagerAddress"], node["NodeManagerPort"])
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
        except OSError:
            return False
        return True

    if not nodes:
        return set()
    with ThreadPoolExecutor(min(len(nodes), MOST_CONNECTIONS)) as pool:
        return {node["NodeID"] for node, there in zip(nodes, pool.map(answers, nodes), strict=True) if there}


def describe_losses(losses: Sequence[Loss], gone: set[str]) -> str:
    """What was lost, in words: ``node a (10.0.0.1) was lost with ranks 0, 1``."""
    nodes: dict[str, list[Loss]] = {}
    for loss in losses:
        if loss.place is not None and loss.place.node in gone:
            nodes.setdefault(loss.place.host, []).append(loss)
    if nodes:
        return "; ".join(f"node {host} was lost with {_ranks(lost)}" for host, lost in nodes.items())
    first = min(losses, key=lambda loss: loss.rank)
    return f"rank {first.rank}{f' on {first.place.host}' if first.place else ''}: the worker process died"


def _ranks(losses: Sequence[Loss]) -> str:
    numbers = ", ".join(str(rank) for rank in sorted(loss.rank for loss in losses))
    return f"rank{'s' if len(losses) > 1 else ''} {numbers}"


def read_logs(place: Place) -> dict[str, bytes]:
    """On the rank's node: the ends of the log files of its process, by name; empty ones are left out."""
    found = {}
    patterns = (f"worker-{place.worker}-*", f"python-core-worker-{place.worker}_*", f"train/*{place.worker}*")
    for path in sorted(path for pattern in patterns for path in Path(place.logs).glob(pattern)):
        with contextlib.suppress(OSError), path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - MOST_LOG_BYTES))
            if text := stream.read():
                found[path.name] = text
    return found


def keep_logs(losses: Sequence[Loss], directory: Path) -> list[str]:
    """Copy what failed ranks have written into the run directory; the folders there, by rank.

    A node that is lost has taken its logs with it: what Ray says of the rank is kept.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    look = ray.remote(num_cpus=0, max_retries=0)(read_logs)
    kept = []
    for loss in losses[:MOST_RANKS]:
        found: dict[str, bytes] = {}
        if loss.place is not None and loss.place.node == here:
            found = read_logs(loss.place)
        elif loss.place is not None:
            pinned = NodeAffinitySchedulingStrategy(loss.place.node, soft=False)
            with contextlib.suppress(ray.exceptions.RayError):
                found = ray.get(look.options(scheduling_strategy=pinned).remote(loss.place), timeout=ANSWER_SECONDS)
        host = f" on {loss.place.host}, process {loss.place.pid}" if loss.place else ""
        found["reason.txt"] = f"rank {loss.rank}{host}\n{loss.reason}\n".encode()
        # A full or read-only disk must not hide what went wrong.
        with contextlib.suppress(OSError):
            folder = directory / loss.folder
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in found.items():
                (folder / name).write_bytes(text)
            kept.append(loss.folder)
    return kept
