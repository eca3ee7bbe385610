"""The manifests for Kubernetes: against KubeRay's own schemas where they are at hand, and what each must have."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from raylm import __version__
from raylm.config import STAGES as STAGE_CONFIGS
from raylm.config.loading import validate
from raylm.launcher.jobs import RUN, STAGE, STORAGE
from tests.cluster_files.manifests import (
    CLUSTER,
    IMAGE_ROOT,
    KUBERAY,
    RAY_KINDS,
    ROOT,
    STAGES,
    cluster_spec,
    crd_errors,
    documents,
    groups,
    ray_object,
    strict,
)
from tests.readme_commands import check_command

CRDS = os.environ.get("RAYLM_KUBERAY_CRDS")
needs_crds = pytest.mark.skipif(not CRDS, reason="RAYLM_KUBERAY_CRDS names no folder with KubeRay's CRDs (*.yaml)")
FILES = sorted(path.name for path in KUBERAY.glob("*.yaml") if path.name != "operator.yaml")


@pytest.fixture(scope="module")
def crds() -> dict[str, dict[str, Any]]:
    """Kind -> its CRD."""
    loaded = [yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader) for path in Path(str(CRDS)).glob("*.yaml")]
    return {crd["spec"]["names"]["kind"]: crd for crd in loaded}


@needs_crds
@pytest.mark.parametrize("name", RAY_KINDS)
def test_kuberay_takes_it(name: str, crds: dict[str, dict[str, Any]]) -> None:
    assert crd_errors(ray_object(name), crds[RAY_KINDS[name]]) == []


@needs_crds
def test_a_mistake_is_found(crds: dict[str, dict[str, Any]]) -> None:
    manifest = ray_object("raycluster.yaml")
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolicies"] = "Always"
    manifest["spec"]["workerGroupSpecs"][0]["replicas"] = "two"
    manifest["spec"]["authOptions"]["mode"] = "password"
    del manifest["spec"]["workerGroupSpecs"][1]["groupName"]
    assert len(crd_errors(manifest, crds["RayCluster"])) == 4


def test_a_structural_schema_is_read_strictly() -> None:
    schema = strict(
        {
            "type": "object",
            "properties": {
                "port": {"x-kubernetes-int-or-string": True},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "open": {"type": "object", "properties": {"a": {}}, "x-kubernetes-preserve-unknown-fields": True},
            },
        }
    )
    assert schema["additionalProperties"] is False
    assert schema["properties"]["port"]["type"] == ["integer", "string"]
    assert schema["properties"]["labels"]["additionalProperties"] == {"type": "string"}
    assert "additionalProperties" not in schema["properties"]["open"]


@pytest.mark.parametrize("name", FILES)
def test_every_object_has_a_kind_and_a_name(name: str) -> None:
    first = (KUBERAY / name).read_text(encoding="utf-8").partition("\napiVersion")[0]
    assert "not yet run on kubernetes" in " ".join(first.replace("#", "").split()).lower()
    for document in documents(KUBERAY / name):
        assert document["apiVersion"] and document["kind"]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?", document["metadata"]["name"])


@pytest.mark.parametrize("name", RAY_KINDS)
def test_a_cluster_is_closed_and_comes_back(name: str) -> None:
    cluster = cluster_spec(ray_object(name))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["networkPolicy"]["mode"] == "DenyAllIngress"
    assert cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # Redis has fields of its own, which the operator refuses beside rocksdb.
    assert set(cluster["gcsFaultToleranceOptions"]) == {"backend", "storage"}


@pytest.mark.parametrize("name", RAY_KINDS)
def test_pods_end_in_order_and_keep_within_limits(name: str) -> None:
    for group, spec in groups(cluster_spec(ray_object(name))):
        pod = spec["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        ray_container = pod["containers"][0]
        environment = {each["name"]: each["value"] for each in ray_container["env"]}
        drain = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        # What is left is for Ray's own end and the logs' last copy.
        assert drain + 30 <= pod["terminationGracePeriodSeconds"]
        assert environment["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"
        assert ray_container["resources"]["requests"] == ray_container["resources"]["limits"]
        assert ("nvidia.com/gpu" in ray_container["resources"]["limits"]) == (group == "gpu")
        assert ray_container["image"] == f"raylm:{__version__}"
        # Autoscaling by Ray 2 wants pods that are not started again.
        assert "restartPolicy" not in pod
        assert pod["securityContext"]["runAsNonRoot"]
        mounts = {mount["mountPath"]: mount["name"] for mount in ray_container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"] == "raylm-shared"
        (logs,) = pod["initContainers"]
        assert logs["restartPolicy"] == "Always" and "/shared/logs" in logs["command"][-1]
        for container in (*pod["containers"], *pod["initContainers"]):
            assert set(container["resources"]) == {"requests", "limits"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)


def test_what_is_claimed_and_mounted_is_there() -> None:
    shared = {(each["kind"], each["metadata"]["name"]): each for each in documents(KUBERAY / "shared.yaml")}
    claim = shared["PersistentVolumeClaim", "raylm-shared"]["spec"]
    assert claim["accessModes"] == ["ReadWriteMany"]
    data = set(shared["ConfigMap", "raylm-history"]["data"])
    for name in (*RAY_KINDS, "history-server.yaml"):
        text = json.dumps(documents(KUBERAY / name))
        named = re.findall(r'"configMapKeyRef": \{"name": "([\w-]+)", "key": "(\w+)"\}', text)
        assert named and {each for each, _ in named} == {"raylm-history"} and {key for _, key in named} == data


@pytest.mark.parametrize("name", RAY_KINDS)
def test_the_budget_selects_pods_that_are_there(name: str) -> None:
    (budget,) = [each for each in documents(KUBERAY / name) if each["kind"] == "PodDisruptionBudget"]
    wanted = budget["spec"]["selector"]["matchLabels"].items()
    pods = [group["template"]["metadata"]["labels"] for _, group in groups(cluster_spec(ray_object(name)))]
    assert any(wanted <= labels.items() for labels in pods)
    # A custom resource without the scale subresource takes a whole number of available pods only.
    assert isinstance(budget["spec"]["minAvailable"], int)


def test_the_three_clusters_agree() -> None:
    """What differs: sizes, the image's name, and for serving the port and the keys."""

    def common(name: str) -> dict[str, Any]:
        text = json.dumps(cluster_spec(ray_object(name)))
        found = json.loads(re.sub(r'"raylm/cluster": "[\w-]+"', '"raylm/cluster": ""', text))
        for rules in (found["networkPolicy"].pop("head"), found["networkPolicy"].pop("worker")):
            assert rules["ingressRules"]
        for _, group in groups(found):
            for size in ("replicas", "minReplicas", "maxReplicas"):
                group.pop(size, None)
            pod = group["template"]["spec"]
            pod["volumes"] = [each for each in pod["volumes"] if each["name"] != "api-keys"]
            for container in (*pod["containers"], *pod["initContainers"]):
                container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] != "api-keys"]
                container["ports"] = [each for each in container.get("ports", []) if each["name"] != "serve"]
        found.pop("upgradeStrategy", None)
        return found

    assert common("raycluster.yaml") == common("rayjob.yaml") == common("rayservice.yaml")


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_runs_a_stage_with_what_the_image_has(stage: str) -> None:
    job = ray_object("rayjob.yaml", stage)
    words = shlex.split(job["spec"]["entrypoint"].replace(f"{IMAGE_ROOT}/", ""))
    check_command(words)
    name = next(word.partition("=")[2] for word in words if word.startswith("run.name="))
    assert job["spec"]["metadata"] == {RUN: name, STAGE: stage, STORAGE: "/shared/runs"}
    assert "${" not in json.dumps(documents(KUBERAY / "rayjob.yaml", stage))


def test_a_job_that_fails_goes_on_with_the_same_run() -> None:
    spec = ray_object("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert environment == {"RAY_JOB_STOP_WAIT_TIME_S": "180", "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    assert "clusterSelector" not in spec, "KubeRay refuses backoffLimit beside it"


def test_the_service_serves_what_serve_yaml_does() -> None:
    config = yaml.safe_load(ray_object("rayservice.yaml")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    validate(STAGE_CONFIGS["serve"], application["args"], "serveConfigV2")
    ours = yaml.safe_load((CLUSTER / "serve.yaml").read_text(encoding="utf-8"))
    ServeDeploySchema.model_validate(ours)
    # On an address that others reach the keys are asked for.
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    keys = application["args"]["serving"].pop("api_keys_file")
    mounts = cluster_spec(ray_object("rayservice.yaml"))["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert str(Path(keys).parent) in [mount["mountPath"] for mount in mounts["volumeMounts"]]
    assert {**config, "http_options": ours["http_options"]} == ours


def test_the_operators_gates_are_open() -> None:
    values = yaml.safe_load((KUBERAY / "operator.yaml").read_text(encoding="utf-8"))
    gates = {gate["name"] for gate in values["featureGates"] if gate["enabled"]}
    needed = {"RayClusterNetworkPolicy", "GCSFaultToleranceEmbeddedStorage", "RayClusterHistoryServer"}
    assert needed <= gates


def test_the_monitor_selects_the_pods() -> None:
    (monitor,) = documents(KUBERAY / "monitoring.yaml")
    (rule,) = monitor["spec"]["selector"]["matchExpressions"]
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for name in RAY_KINDS:
        offered = set()
        for _, group in groups(cluster_spec(ray_object(name))):
            assert rule["key"] in group["template"]["metadata"]["labels"]
            offered |= {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports <= offered


def test_the_image_takes_what_is_there() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    kept = {
        line.removeprefix("!").rstrip("/")
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    for line in re.findall(r"^COPY --chown=ray (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert list(ROOT.glob(source)), source
            assert source.split("/")[0] in kept, source
    assert f"raylm:{__version__}" in text
    assert f"WORKDIR {IMAGE_ROOT}" in text
