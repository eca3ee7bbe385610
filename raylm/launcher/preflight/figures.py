"""What of a preflight's record `raylm plan --measured` reckons with: figures of a worker instead of a data sheet's."""

from __future__ import annotations

import statistics
from typing import Any


def figures(record: dict[str, Any]) -> dict[str, float]:
    """By the names of :class:`raylm.cluster.hardware.Figures`; only what was measured.

    A worker is a CPU, or a GPU where all nodes have some. A GPU's products of large square matrices say little of a
    model's, so its data sheet stays.
    """
    nodes = [node for node in record["nodes"] if "error" not in node]
    found: dict[str, float] = {}
    if not nodes:
        return found
    on_gpus = all(node["gpus"] for node in nodes)
    workers = max(len(node["gpus"]) if on_gpus else node["cpus"] for node in nodes)
    products = [record["products"].get(node["address"], {}).get("float32") for node in nodes]
    if not on_gpus and all(products):
        # All wait for the slowest.
        found["matrix_flops"] = min(rate / node["cpus"] for rate, node in zip(products, nodes, strict=True))
    reduced = record["all_reduce"]
    if "seconds" in reduced:
        sizes = {int(size): seconds for size, seconds in reduced["seconds"].items()}
        found["far_bandwidth"] = _ring_rate(sizes, reduced["nodes"]) / workers
        found["collective_seconds"] = sizes[min(sizes)]
    timed = record.get("workers")
    if timed and "error" not in timed and not on_gpus:
        found |= _of_workers(timed, len(nodes))
    return found


def _of_workers(timed: dict[str, Any], nodes: int) -> dict[str, float]:
    """What workers got while all of them computed."""
    count = timed["count"]
    on_node: dict[str, list[dict[str, float]]] = {}
    for name, one in timed["rates"].items():
        on_node.setdefault(name.split()[0], []).append(one)
    found = {}
    for name in next(iter(on_node.values()))[0]:
        means = [statistics.fmean(one[name] for one in workers) for workers in on_node.values()]
        # All wait for the slowest node.
        found[name] = max(means) if name == "launch_seconds" else min(means)
    near = [{int(size): seconds for size, seconds in one.items()} for one in timed["near"].values()]
    far = {int(size): seconds for size, seconds in timed["far"].items()}
    if near:
        found["near_bandwidth"] = min(_ring_rate(one, count) for one in near)
        found["collective_seconds"] = max(one[min(one)] for one in near)
    if far:
        # A ring enters and leaves a node once, and has the shares of all of its workers.
        found["far_bandwidth"] = _ring_rate(far, count * nodes) / count
        found.setdefault("collective_seconds", far[min(far)])
    return found


def _ring_rate(seconds: dict[int, float], members: int) -> float:
    """Bytes/s that a member sends: 2 (n - 1) / n of what is summed (Patarasu and Yuan 2009); by the largest sum."""
    largest = max(seconds)
    return 2 * (members - 1) / members * largest / seconds[largest]
