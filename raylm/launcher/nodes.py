"""``python -m raylm.launcher.nodes`` on a node: one line of JSON with the nodes that its cluster has."""

from __future__ import annotations

import json
from typing import Any

from raylm.cluster.session import ray_session


def live_nodes() -> list[dict[str, Any]]:
    """The live nodes, the head first: address, name, id, whether it is the head, resources. Ray must be connected."""
    import ray

    found = [
        {
            "address": node["NodeManagerAddress"],
            "name": node["NodeManagerHostname"],
            "id": node["NodeID"],
            "head": "node:__internal_head__" in node["Resources"],
            "resources": {name: value for name, value in node["Resources"].items() if not name.startswith("node:")},
        }
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (not node["head"], node["address"]))


def main() -> None:
    """Print the nodes of the cluster that runs on this machine."""
    import os

    os.environ.setdefault("RAY_ADDRESS", "auto")
    with ray_session():
        print(json.dumps({"nodes": live_nodes()}), flush=True)


if __name__ == "__main__":
    main()
