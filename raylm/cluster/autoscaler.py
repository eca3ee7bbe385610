"""What nodes a cluster may still get: the kinds that its autoscaler starts, and how many of each.

In: nothing but the joined cluster. Out: node types, none where nothing starts nodes. Ray tells a driver the live nodes
only. The types stand where the autoscaler reads them: in Ray's control store, where whoever runs the cluster has put
them there; in the file that the head was started with (``ray up``, ``ray start --autoscaling-config``); or in the
RayCluster of KubeRay, which the head's service account may read
(https://docs.ray.io/en/latest/cluster/kubernetes/user-guides/configuring-autoscaling.html).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ANSWER_SECONDS = 60.0
FILE_OPTION, ADDRESS_OPTION = "--autoscaling-config=", "--gcs-address="
# Of a type without a limit, which Ray writes as -1.
MANY = 1000
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler starts.

    Attributes:
        name: as the autoscaler's configuration has it.
        resources: what a node of it has, by Ray's names.
        most: nodes of it at a time.
    """

    name: str
    resources: Mapping[str, float]
    most: int


@dataclass(frozen=True)
class Autoscaler:
    """What an autoscaler may start.

    Attributes:
        types: kinds of nodes, but for the head's.
        most: nodes of all types together, the head not counted.
    """

    types: tuple[NodeType, ...] = ()
    most: int = MANY


def find_autoscaler() -> Autoscaler:
    """That of the joined cluster; one without types where there is none, or what it may start cannot be read."""
    import ray

    node = ray._private.worker._global_node
    # A local Ray, which this process started, gets no further nodes; a client (ray://) sees none of this.
    if node is None or node.head:
        return Autoscaler()
    return _reported() or from_configuration(_on_the_head())


def from_configuration(configuration: Mapping[str, Any]) -> Autoscaler:
    """From a file as ``ray up`` takes it (``available_node_types``, ``head_node_type``, ``max_workers``)."""
    most = _limit(configuration.get("max_workers", MANY))
    types = [
        NodeType(name, dict(one.get("resources") or {}), min(most, _limit(one.get("max_workers", most))))
        for name, one in (configuration.get("available_node_types") or {}).items()
        if name != configuration.get("head_node_type")
    ]
    return Autoscaler(tuple(one for one in types if one.most > 0), most)


def _limit(number: int) -> int:
    return MANY if number < 0 else min(MANY, int(number))


def _reported() -> Autoscaler | None:
    """What the control store has; Ray's own autoscalers leave it empty."""
    import ray

    config = ray._private.state.state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    groups = config.node_group_configs
    return Autoscaler(tuple(NodeType(one.name, dict(one.resources), _limit(one.max_count)) for one in groups))


def _on_the_head() -> dict[str, Any]:
    """The configuration that the head's autoscaler reads; empty where it has none, or the head does not answer."""
    import ray

    look = ray.remote(num_cpus=0, max_retries=0, resources={"node:__internal_head__": 0.001})(read_configuration)
    try:
        return ray.get(look.remote(ray.get_runtime_context().gcs_address), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return {}


def read_configuration(gcs_address: str) -> dict[str, Any]:
    """On the head of the cluster with that address: its autoscaler's configuration, empty where it has none."""
    path = _configuration_file(gcs_address)
    if path is None:
        return _of_kuberay()
    try:
        return yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _configuration_file(gcs_address: str) -> str | None:
    """The file in the command line of the cluster's autoscaler, which Ray calls its monitor."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        options = process.info["cmdline"] or ()
        if f"{ADDRESS_OPTION}{gcs_address}" in options:
            for option in options:
                if option.startswith(FILE_OPTION):
                    return option.removeprefix(FILE_OPTION)
    return None


def _of_kuberay() -> dict[str, Any]:
    """The RayCluster that this pod is the head of, as KubeRay's autoscaler reads it. Not run yet."""
    import requests

    # Set by KubeRay in every pod of a cluster.
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not NAMESPACE_FILE.is_file():
        return {}
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        cluster = KubernetesHttpApiClient(NAMESPACE_FILE.read_text().strip()).get(f"rayclusters/{name}")
    except (OSError, requests.RequestException):
        # Only a head whose cluster scales may read it.
        return {}
    if not cluster.get("spec", {}).get("enableInTreeAutoscaling"):
        return {}
    return _derive_autoscaling_config_from_ray_cr(cluster)
