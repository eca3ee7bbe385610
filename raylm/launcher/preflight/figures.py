"""What of a preflight's record `raylm plan --measured` reckons with: figures of a worker instead of a data sheet's."""

from __future__ import annotations

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
        sizes = sorted(int(size) for size in reduced["seconds"])
        largest, count = sizes[-1], reduced["nodes"]
        # Each node sends and takes 2 (n - 1) / n of what is summed (Patarasu and Yuan 2009).
        found["far_bandwidth"] = 2 * (count - 1) / count * largest / reduced["seconds"][str(largest)] / workers
        found["collective_seconds"] = reduced["seconds"][str(sizes[0])]
    return found
