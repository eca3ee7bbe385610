"""What a cluster has or can get, as far as a plan needs it: nodes with CPUs, GPUs and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.cluster.autoscaler import Autoscaler, NodeType, find_autoscaler
from raylm.cluster.hardware import GPUS
from raylm.config.run import ResourcesSection

# A worker holds this before it builds anything: on a CPU the imported libraries (measured), on a GPU CUDA's context and
# NCCL's buffers.
PROCESS_BYTES = {False: 0.6e9, True: 1.5e9}
# Ray keeps the rest of a node's memory for its object store.
SHARE_OF_NODE = 0.7
# Ray's own: a resource that only the head has, and the label of the autoscaler's type of a node.
HEAD, GROUP_LABEL = "node:__internal_head__", "ray.io/node-group"


@dataclass(frozen=True)
class Node:
    """One host.

    Attributes:
        memory: bytes that processes may hold; None if not known.
        gpu_memory: bytes of each GPU; None if not known.
        there: False of a node that the cluster's autoscaler starts where it is asked for.
        kind: of its GPUs, a key of :data:`~raylm.cluster.hardware.GPUS`; None if not known.
    """

    cpus: float
    gpus: float = 0.0
    memory: float | None = None
    gpu_memory: float | None = None
    there: bool = True
    kind: str | None = None


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster, with those that it can get."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def uses_gpus(self, resources: ResourcesSection) -> bool:
        """Whether each worker holds a GPU."""
        per_worker = resources.gpus_per_worker
        return self.gpus >= 1 if per_worker == "auto" else per_worker == 1

    def _places(self, node: Node, resources: ResourcesSection) -> int:
        by_cpu = int(node.cpus / resources.cpus_per_worker + 1e-9)
        return min(by_cpu, int(node.gpus)) if self.uses_gpus(resources) else by_cpu

    def places(self, resources: ResourcesSection) -> int:
        """Workers that the cluster holds."""
        return sum(self._places(node, resources) for node in self.nodes)

    def missing(self, workers: int, resources: ResourcesSection) -> tuple[Node, ...]:
        """Nodes that must still start so that the cluster holds ``workers``, the fewest; none where it does already."""
        use_gpu = self.uses_gpus(resources)
        left = workers - sum(self._places(node, resources) for node in self.nodes if node.there)
        # GPUs are left to those who need them.
        can_start = sorted(
            (node for node in self.nodes if not node.there),
            key=lambda node: (0.0 if use_gpu else node.gpus, -self._places(node, resources)),
        )
        needed = []
        for node in can_start:
            if left <= 0:
                break
            if places := self._places(node, resources):
                needed.append(node)
                left -= places
        return tuple(needed)

    def places_per_node(self, resources: ResourcesSection) -> int:
        """Workers that a node holds, as far as all nodes with any do."""
        if resources.workers_per_node is not None:
            return resources.workers_per_node
        return min((n for node in self.nodes if (n := self._places(node, resources))), default=1)

    def memory_per_worker(self, resources: ResourcesSection) -> float | None:
        """Bytes that a worker may hold, on the node that leaves it the least; None if not known."""
        if resources.memory_per_worker_gb is not None:
            return resources.memory_per_worker_gb * 1e9
        gpu = self.uses_gpus(resources)
        found = []
        for node in self.nodes:
            if not (places := self._places(node, resources)):
                continue
            if isinstance(resources.workers, int):
                places = min(places, resources.workers)
            size = node.gpu_memory if gpu else node.memory
            found.append(None if size is None else size if gpu else size / places)
        return None if not found or None in found else min(found)


def this_machine(gpus: int = 0, gpu_memory: float | None = None) -> Capacity:
    """This host by itself; its memory as Ray would count it."""
    return Capacity((Node(float(os.cpu_count() or 1), float(gpus), SHARE_OF_NODE * _memory(), gpu_memory),))


def _memory() -> float:
    """Bytes of main memory, or of the container's share of it."""
    size = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(size, float(text)) if text.isdigit() else size


def planned_cluster(resources: ResourcesSection, here: Capacity) -> Capacity:
    """What ``raylm plan`` plans for: this machine, or the cluster that ``resources`` describes."""
    if not isinstance(resources.workers, int) or here.places(resources) >= resources.workers:
        return here
    per_node = resources.workers_per_node or resources.workers
    gpu = resources.gpus_per_worker == 1
    node = Node(
        cpus=per_node * resources.cpus_per_worker,
        gpus=float(per_node) if gpu else 0.0,
        gpu_memory=here.nodes[0].gpu_memory,
    )
    return Capacity((node,) * -(-resources.workers // per_node))


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster: ``{"CPU": 8.0, "GPU": 0.0}``."""
    import ray

    total = ray.cluster_resources()
    return {"CPU": total.get("CPU", 0.0), "GPU": total.get("GPU", 0.0)}


def cluster_capacity() -> Capacity:
    """The nodes of the joined cluster, and those that its autoscaler can add, as far as they have CPUs."""
    import ray

    live = [node for node in ray.nodes() if node["Alive"]]
    can_start = [_node(resources, there=False) for resources in startable(find_autoscaler(), live)]
    return Capacity((*_with_cpus(live), *(node for node in can_start if node.cpus > 0)))


def live_places(resources: ResourcesSection) -> int:
    """Workers that the nodes of the joined cluster hold that are there now."""
    import ray

    return Capacity(_with_cpus([node for node in ray.nodes() if node["Alive"]])).places(resources)


def _with_cpus(live: list[dict[str, Any]]) -> tuple[Node, ...]:
    return tuple(_node(node["Resources"]) for node in live if node["Resources"].get("CPU", 0) > 0)


def startable(autoscaler: Autoscaler, live: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Resources of each node that the autoscaler can add to the ``live`` ones, which ray.nodes() gives."""
    workers = [node for node in live if HEAD not in node["Resources"]]
    left = autoscaler.most - len(workers)
    found: list[dict[str, float]] = []
    # Where not all types can have their most, GPUs first.
    for kind in sorted(
        autoscaler.types, key=lambda kind: (-kind.resources.get("GPU", 0), -kind.resources.get("CPU", 0))
    ):
        count = min(left - len(found), kind.most - sum(_is_of(node, kind) for node in workers))
        found += [dict(kind.resources)] * max(0, count)
    return found


def _is_of(node: dict[str, Any], kind: NodeType) -> bool:
    """Whether a live node is of that type: by its label, or else by what it has."""
    if (group := node.get("Labels", {}).get(GROUP_LABEL)) is not None:
        return group == kind.name
    return all(node["Resources"].get(name, 0) == kind.resources.get(name, 0) for name in ("CPU", "GPU"))


def _node(resources: dict[str, float], *, there: bool = True) -> Node:
    gpus = float(resources.get("GPU", 0.0))
    kind = _gpu_kind(resources) if gpus else None
    memory = GPUS[kind].gib * 2.0**30 if kind else None
    return Node(float(resources.get("CPU", 0.0)), gpus, resources.get("memory"), memory, there, kind)


def _gpu_kind(resources: dict[str, float]) -> str | None:
    """Of a node's GPUs, by the name that Ray gives them; None if it is not known."""
    named = (name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:"))
    return next((name for name in named if name in GPUS), None)
