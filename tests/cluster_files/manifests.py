"""The files in cluster/ as data: manifests with what envsubst fills in, and a check against a CRD."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from raylm import __version__

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
RAY_KINDS = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob", "rayservice.yaml": "RayService"}
# Stages that are jobs -> what they need beside their recipe.
STAGES = {
    "prepare": "",
    "pretrain": "data.train=/shared/runs/data",
    "finetune": "model.path=/shared/runs/pretrain",
    "tune": "data.train=/shared/runs/data model.path=/shared/runs/finetune",
    "evaluate": "data.train=/shared/runs/data model.path=/shared/runs/pretrain",
    "compress": "data.train=/shared/runs/data model.path=/shared/runs/tune",
}
# Where the image has the clone.
IMAGE_ROOT = "/opt/raylm"


def values_of(stage: str) -> dict[str, str]:
    """What envsubst fills in for a stage."""
    return {
        "STAGE": stage,
        "RUN": f"my-{stage}",
        "CONFIG": f"{IMAGE_ROOT}/jobs/recipes/quickstart/{stage}.yaml",
        "SETTINGS": STAGES[stage],
        "IMAGE": f"raylm:{__version__}",
        "CPU_WORKERS": "2",
        "GPU_WORKERS": "0",
    }


def documents(path: Path, stage: str = "pretrain") -> list[dict[str, Any]]:
    """The manifests of a file, as envsubst leaves them."""
    text = path.read_text(encoding="utf-8")
    if path.name == "rayjob.yaml":
        text = string.Template(text).safe_substitute(values_of(stage))
    return [document for document in yaml.safe_load_all(text) if document is not None]


def ray_object(name: str, stage: str = "pretrain") -> dict[str, Any]:
    """The RayCluster, RayJob or RayService of a file."""
    (found,) = [each for each in documents(KUBERAY / name, stage) if each["kind"] == RAY_KINDS[name]]
    return found


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """The cluster in a RayCluster, RayJob or RayService."""
    spec = manifest["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[
        manifest["kind"]
    ]


def groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, group) of the head and of each kind of worker."""
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def crd_errors(manifest: dict[str, Any], crd: dict[str, Any]) -> list[str]:
    """One line for each thing that the API server would refuse, or drop for being unknown."""
    version = manifest["apiVersion"].partition("/")[2]
    (found,) = [each for each in crd["spec"]["versions"] if each["name"] == version and each["served"]]
    schema = strict(found["schema"]["openAPIV3Schema"])
    # Part of every object, which a CRD leaves out.
    schema["properties"]["metadata"] = {"type": "object"}
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in found]


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON Schema that refuses unknown fields, as `kubectl apply` does."""
    kept = {
        key: schema[key]
        for key in ("type", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems", "required", "maxLength")
        if key in schema
    }
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(kept.get("type"), str):
        kept["type"] = [kept["type"], "null"]
    if "items" in schema:
        kept["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(schema["additionalProperties"])
    elif "properties" in schema:
        kept["properties"] = {name: strict(each) for name, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    return kept
