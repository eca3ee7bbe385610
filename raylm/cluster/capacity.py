"""What a cluster has, as far as a plan needs it: nodes with CPUs, GPUs and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from raylm.cluster.hardware import GPUS
from raylm.config.run import ResourcesSection

# A worker holds this before it builds anything: on a CPU the imported libraries (measured), on a GPU CUDA's context and
# NCCL's buffers.
PROCESS_BYTES = {False: 0.6e9, True: 1.5e9}
# Ray keeps the rest of a node's memory for its object store.
SHARE_OF_NODE = 0.7


@dataclass(frozen=True)
class Node:
    """One host; ``memory`` is what processes may hold, ``gpu_memory`` that of each GPU, in bytes, None if not known."""

    cpus: float
    gpus: float = 0.0
    memory: float | None = None
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster."""

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
    return next((GPUS[name].gib * 2.0**30 for name in named if name in GPUS), None)
