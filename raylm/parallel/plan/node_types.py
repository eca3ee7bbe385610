"""The nodes that a cluster file describes: what a plan needs to know of a cluster that is not there yet.

In: a YAML file of Ray's cluster launcher (docs.ray.io, "Cluster YAML Configuration Options"), or a Kubernetes manifest
with a RayCluster, RayJob or RayService. Out: its kinds of nodes, as many of each as the file lets there be. What GPU a
node has is read from its ``accelerator_type`` resource, its machine type, its accelerators, or its node selector.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raylm.cluster.hardware import GPUS, INSTANCES, Instance, gpu_kind
from raylm.config.loading import read_configuration
from raylm.config.mistakes import cut, shown
from raylm.config.yaml_text import parse_yaml
from raylm.errors import UserError

ACCELERATOR = "accelerator_type:"
# Labels of Kubernetes nodes: of GKE, of NVIDIA's GPU feature discovery, of Karpenter on AWS.
GPU_LABELS = ("cloud.google.com/gke-accelerator", "nvidia.com/gpu.product", "karpenter.k8s.aws/instance-gpu-name")
MACHINE_LABELS = ("node.kubernetes.io/instance-type", "beta.kubernetes.io/instance-type")
# docs.ray.io: clusters without max_workers have two beside the head.
WORKERS = 2
_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


@dataclass(frozen=True)
class NodeType:
    """A kind of node of a cluster.

    Attributes:
        name: in the file.
        count: most nodes of it.
        cpus: of a node; None where the file does not say.
        gpus: of a node.
        kind: of GPU, a key of :data:`raylm.cluster.hardware.GPUS`; None without one.
        memory: bytes of main memory of a node; None where the file does not say.
        network: to other nodes, bytes/s; None where the file does not say.
        head: whether it is the head.
        machine: the cloud's name of its machine, where the file says it.
    """

    name: str
    count: int
    cpus: float | None = None
    gpus: int = 0
    kind: str | None = None
    memory: float | None = None
    network: float | None = None
    head: bool = False
    machine: str | None = None


def read_node_types(path: Path) -> list[NodeType]:
    """The kinds of nodes of a cluster file, the head first.

    Raises:
        UserError: it is no such file, or names a machine or a GPU that is not known.
    """
    text = read_configuration(path)
    # Manifests hold several documents.
    documents = [parse_yaml(part, str(path)).values for part in re.split(r"(?m)^---\s*$", text) if part.strip()]
    sections = [document for document in documents if isinstance(document, dict)]
    for section in sections:
        if (spec := _ray_cluster(section)) is not None:
            return list(_kuberay(spec, str(path)))
    for section in sections:
        if "available_node_types" in section:
            return list(_launcher(section, str(path)))
        provider = section.get("provider")
        if isinstance(provider, dict) and provider.get("type") == "local":
            return list(_local(section, provider, str(path)))
    raise UserError(
        f"{path}: found no nodes, allowed: a YAML file of Ray's cluster launcher (available_node_types, or provider "
        "with type: local), or a manifest of kind RayCluster, RayJob or RayService"
    )


def _ray_cluster(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What specifies the cluster in a manifest; None where it is about something else."""
    key = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(
        str(manifest.get("kind"))
    )
    if key is None:
        return None
    spec = manifest.get("spec")
    found = spec.get(key) if key and isinstance(spec, dict) else spec
    return found if isinstance(found, dict) else {}


def _launcher(section: dict[str, Any], origin: str) -> Iterator[NodeType]:
    types, head = _section(section, "available_node_types", origin), section.get("head_node_type")
    if head not in types:
        raise UserError(f"{origin}: head_node_type: found {shown(head)}, allowed: {', '.join(map(cut, types))}")
    most = _count(section.get("max_workers", WORKERS), f"{origin}: max_workers")
    for name in sorted(types, key=lambda name: name != head):
        key = f"{origin}: available_node_types.{cut(name)}"
        values = _section(types, name, origin)
        node = _section(values, "node_config", key)
        resources = _section(values, "resources", key)
        found = _with_resources(_machine(name, node, key), resources, key)
        if name == head:
            yield replace(found, count=1, head=True)
        workers = _count(values.get("max_workers", 0 if name == head else most), f"{key}.max_workers")
        if count := min(workers, most):
            yield replace(found, count=count)


def _machine(name: str, node: dict[str, Any], key: str) -> NodeType:
    """A node by the type of its machine and by accelerators that go with it."""
    machine = node.get("InstanceType") or node.get("machineType")
    found = NodeType(name, 0)
    if machine is not None:
        short = str(machine).rsplit("/", 1)[-1]
        found = replace(_of_instance(found, INSTANCES.get(short)), machine=cut(short))
        if found.cpus is None and (size := re.fullmatch(r"[cmr]\d\w*\.(\d{0,2})xlarge", short)):
            # AWS: four virtual CPUs, times the number in front.
            found = replace(found, cpus=4.0 * int(size[1] or 1))
    for accelerator in node.get("guestAccelerators") or []:
        kind = _kind(str(accelerator.get("acceleratorType")).rsplit("/", 1)[-1], f"{key}.node_config.guestAccelerators")
        found = replace(found, kind=kind, gpus=_count(accelerator.get("acceleratorCount", 1), f"{key}.node_config"))
    return found


def _of_instance(found: NodeType, instance: Instance | None) -> NodeType:
    if instance is None:
        return found
    return replace(
        found,
        kind=instance.kind,
        gpus=instance.gpus,
        cpus=float(instance.cpus),
        memory=instance.gib * 2.0**30,
        network=instance.gbits * 1e9 / 8,
    )


def _with_resources(found: NodeType, resources: dict[str, Any], key: str) -> NodeType:
    """What the resources that a file gives Ray add to what is known of the machine, or change."""
    if "CPU" in resources:
        found = replace(found, cpus=_quantity(resources["CPU"], f"{key}.resources.CPU"))
    if "GPU" in resources:
        found = replace(found, gpus=int(_quantity(resources["GPU"], f"{key}.resources.GPU")))
    if "memory" in resources:
        found = replace(found, memory=_quantity(resources["memory"], f"{key}.resources.memory"))
    named = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
    if named:
        found = replace(found, kind=_kind(named[0], f"{key}.resources"))
    return found


def _local(section: dict[str, Any], provider: dict[str, Any], origin: str) -> Iterator[NodeType]:
    """On-premises machines: Ray asks each what it has, the file does not say it."""
    addresses = provider.get("worker_ips")
    workers = len(addresses) if isinstance(addresses, list) else section.get("max_workers", 0)
    count = _count(section.get("max_workers", workers), f"{origin}: max_workers")
    yield NodeType("head", 1, head=True)
    if count := min(count, _count(workers, f"{origin}: provider.worker_ips")):
        yield NodeType("workers", count)


def _kuberay(spec: dict[str, Any], origin: str) -> Iterator[NodeType]:
    yield replace(_group("head", _section(spec, "headGroupSpec", origin), origin), count=1, head=True)
    groups = spec.get("workerGroupSpecs") or []
    for group in groups if isinstance(groups, list) else []:
        if not isinstance(group, dict):
            raise UserError(f"{origin}: workerGroupSpecs: found {shown(group)}, allowed: keys with values")
        name = str(group.get("groupName", "workers"))
        key = f"{origin}: {cut(name)}"
        replicas = _count(group.get("maxReplicas", group.get("replicas", 1)), f"{key}.maxReplicas")
        if count := replicas * _count(group.get("numOfHosts", 1), f"{key}.numOfHosts"):
            yield replace(_group(name, group, origin), count=count)


def _group(name: str, group: dict[str, Any], origin: str) -> NodeType:
    """A group of pods: what its first container may use, which is what KubeRay tells Ray, unless told otherwise."""
    key = f"{origin}: {cut(name)}"
    template = _section(_section(_section(group, "template", key), "spec", key), "", key)
    selector = _section(template, "nodeSelector", key)
    found = NodeType(name, 0)
    for label in MACHINE_LABELS:
        instance = _of_instance(found, INSTANCES.get(str(selector.get(label))))
        # A pod has as many of the machine's GPUs and CPUs as it asks for.
        found = replace(found, kind=instance.kind or found.kind, network=instance.network or found.network)
    for label in GPU_LABELS:
        if label in selector:
            found = replace(found, kind=_kind(str(selector[label]), f"{key}.nodeSelector.{label}"))
    containers = template.get("containers")
    container = containers[0] if isinstance(containers, list) and containers else {}
    asked = _section(container, "resources", key)
    limits = {**_section(asked, "requests", key), **_section(asked, "limits", key)}
    names = {"cpu": "CPU", "memory": "memory", "nvidia.com/gpu": "GPU"}
    found = _with_resources(found, {names[k]: v for k, v in limits.items() if k in names}, key)
    parameters = _section(group, "rayStartParams", key)
    names = {"num-cpus": "CPU", "num-gpus": "GPU", "memory": "memory"}
    found = _with_resources(found, {names[k]: v for k, v in parameters.items() if k in names}, key)
    found = _with_resources(found, _custom(parameters.get("resources"), f"{key}.rayStartParams"), key)
    return _with_resources(found, _section(group, "resources", key), key)


def _custom(text: Any, key: str) -> dict[str, Any]:
    """``resources`` of rayStartParams: JSON in quotes, which KubeRay wants twice over."""
    try:
        found = json.loads(str(text).strip().strip("'\"").replace('\\"', '"')) if text is not None else {}
    except ValueError:
        raise UserError(f"{key}.resources: found {shown(text)}, allowed: JSON") from None
    return found if isinstance(found, dict) else {}


def _section(values: Any, key: str, origin: str) -> dict[str, Any]:
    """``values[key]``, or ``values`` where there is no key; empty where nothing is given."""
    found = values.get(key) if key and isinstance(values, dict) else values
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{origin}: {key}: found {shown(found)}, allowed: keys with values")
    return found


def _kind(name: str, key: str) -> str:
    kind = name if name in GPUS else gpu_kind(name)
    if kind is None:
        raise UserError(f"{key}: found GPU {shown(name)}, allowed: {', '.join(GPUS)}")
    return {"nvidia-tesla-a100": "A100-40G"}.get(name, kind)


def _count(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str) or not re.fullmatch(r"\d{1,6}", str(value)):
        raise UserError(f"{key}: found {shown(value)}, allowed: an integer from 0")
    return int(value)


def _quantity(value: Any, key: str) -> float:
    """A number, or a quantity of Kubernetes as 500m and 64Gi."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGT]|[KMGT]i)?", str(value).strip().strip("\"'"))
    if found is None:
        raise UserError(f"{key}: found {shown(value)}, allowed: a number")
    return float(found.group(1)) * _UNITS[found.group(2) or ""]
