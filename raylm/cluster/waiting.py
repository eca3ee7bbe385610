"""Waiting for nodes that a cluster's autoscaler starts.

In: how many workers are to run, and what the cluster has and can get. A placement group asks for their places, as
Ray's autoscaler starts what a pending one needs. It belongs to the job: where the job dies, nothing goes on asking.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from raylm.cluster.capacity import Capacity, Node, cluster_capacity
from raylm.config.run import ResourcesSection
from raylm.errors import RunFailure
from raylm.progress import Activity

POLL_SECONDS = 1.0
# For what only marks nodes as used.
MARK_SECONDS = 30.0


@contextlib.contextmanager
def nodes_for(stage: str, workers: int, resources: ResourcesSection, capacity: Capacity) -> Iterator[bool]:
    """Have the cluster start what ``workers`` need, and wait for it; gives whether there was something to wait for.

    Within the block the new nodes count as used, so that the autoscaler does not stop them again, but their CPUs and
    GPUs are free.

    Args:
        stage: name in what is shown.

    Raises:
        RunFailure: they did not come within ``resources.node_wait_seconds``.
    """
    missing = capacity.missing(workers, resources)
    if not missing:
        yield False
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    before = {node["NodeID"] for node in _live()}
    share = worker_share(resources, use_gpu=capacity.uses_gpus(resources))
    places = placement_group([share] * workers, strategy="PACK")
    try:
        _wait(stage, places, missing, before, resources.node_wait_seconds)
        marked = _marked([node for node in _live() if node["NodeID"] not in before])
    finally:
        remove_placement_group(places)
    try:
        yield True
    finally:
        if marked is not None:
            remove_placement_group(marked)


def live_capacity(stage: str, resources: ResourcesSection, refuse: Callable[[Capacity], object]) -> Capacity:
    """What the cluster has and can get, once a node is there on which data are prepared and speeds measured.

    Args:
        refuse: raises for a run that the cluster can never hold, so that no node starts for it.

    Raises:
        RunFailure: no node came within ``resources.node_wait_seconds``.
    """
    capacity = cluster_capacity()
    if any(node.there for node in capacity.nodes):
        return capacity
    refuse(capacity)
    with nodes_for(stage, 1, resources, capacity):
        return cluster_capacity()


def worker_share(resources: ResourcesSection, *, use_gpu: bool) -> dict[str, float]:
    """What a worker reserves, by Ray's names."""
    return {"CPU": resources.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}


def _live() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _wait(stage: str, places: Any, missing: tuple[Node, ...], before: set[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with Activity(f"{stage}: waiting for {awaited(missing, [])}") as activity:
        while not places.wait(POLL_SECONDS):
            came = [node["Resources"] for node in _live() if node["NodeID"] not in before]
            text = awaited(missing, came)
            if time.monotonic() > deadline:
                raise RunFailure(
                    f"resources.node_wait_seconds: after {seconds:g} s the cluster has not started {text}; ray status "
                    "on its head says what it waits for"
                )
            activity.change(f"{stage}: waiting for {text}")


def awaited(missing: tuple[Node, ...], came: list[dict[str, float]]) -> str:
    """``2 nodes with 4 CPUs each: 1 of 2 there``.

    Args:
        missing: nodes that are waited for.
        came: resources of the nodes that have started since.
    """
    wanted = Counter((node.cpus, node.gpus) for node in missing)
    there = Counter((one.get("CPU", 0.0), one.get("GPU", 0.0)) for one in came)
    parts = []
    for (cpus, gpus), count in wanted.items():
        each = f"{cpus:g} CPU{'s' if cpus != 1 else ''}"
        each += f" and {gpus:g} GPU{'s' if gpus != 1 else ''}" if gpus else ""
        nodes = f"1 node with {each}" if count == 1 else f"{count} nodes with {each} each"
        parts.append(f"{nodes}: {min(count, there[cpus, gpus])} of {count} there")
    return "; ".join(parts)


def _marked(nodes: list[dict[str, Any]]) -> Any:
    """A placement group with a sliver of each node's own marker, which makes it count as used; None without nodes."""
    from ray.util.placement_group import placement_group, remove_placement_group

    if not nodes:
        return None
    group = placement_group([{f"node:{node['NodeManagerAddress']}": 0.001} for node in nodes])
    if not group.wait(MARK_SECONDS):
        # A node that left again; the workers' own group will ask for another.
        remove_placement_group(group)
        return None
    return group
