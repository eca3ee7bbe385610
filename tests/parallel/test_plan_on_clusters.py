"""``raylm plan --cluster``: cluster files as Ray and KubeRay read them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from raylm.cli import main
from raylm.cluster.capacity import Capacity, Node
from raylm.cluster.capacity import _with_cpus as live_nodes
from raylm.cluster.hardware import GPUS, NETWORK, gpu_figures
from raylm.errors import UserError
from raylm.parallel.plan.node_types import NodeType, read_node_types
from raylm.parallel.plan.on_clusters import Terms, describe_plan, plan_on_cluster, read_terms
from raylm.parallel.plan.planning import make_plan, plan_training
from tests.parallel.test_plan import changed, config  # noqa: F401 - a fixture

CONTAINER = {"name": "ray", "image": "rayproject/ray:2.60.0"}


def aws(worker: dict, **more) -> dict:
    """A cluster launcher's file with a head without GPUs."""
    return {
        "cluster_name": "x",
        "provider": {"type": "aws", "region": "us-west-2"},
        "max_workers": 8,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {}, "node_config": {"InstanceType": "m5.2xlarge"}},
            "gpu": {"resources": {}, "max_workers": 4, "node_config": {}, **worker},
        },
    } | more


def gcp(node: dict, **resources) -> dict:
    types = {"head": {"resources": {"CPU": 2}, "node_config": {"machineType": "n1-standard-2"}}}
    types |= {"gpu": {"resources": resources, "max_workers": 4, "node_config": node}}
    return aws({}) | {"provider": {"type": "gcp"}, "available_node_types": types}


def kuberay(kind: str = "RayCluster", selector: dict | None = None, limits: dict | None = None, **group) -> dict:
    """A manifest with a head that takes no work."""
    limits = {"cpu": "64", "memory": "1000Gi", "nvidia.com/gpu": 8} if limits is None else limits
    head = {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": {"containers": [CONTAINER]}}}
    pod = {"nodeSelector": selector or {}, "containers": [CONTAINER | {"resources": {"limits": limits}}]}
    worker = {"groupName": "gpu", "replicas": 1, "maxReplicas": 4, "rayStartParams": {}, "template": {"spec": pod}}
    spec: dict = {"headGroupSpec": head, "workerGroupSpecs": [worker | group]}
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(kind)
    return {"apiVersion": "ray.io/v1", "kind": kind, "spec": {key: spec} if key else spec}


def write(folder: Path, *documents: dict) -> Path:
    path = folder / "cluster.yaml"
    path.write_text("---\n".join(yaml.safe_dump(document) for document in documents))
    return path


def worker_of(folder: Path, *documents: dict) -> NodeType:
    head, worker = read_node_types(write(folder, *documents))
    assert (head.count, head.head, head.gpus) == (1, True, 0)
    return worker


def test_a_launchers_file_names_machines_or_resources(tmp_path: Path) -> None:
    found = worker_of(tmp_path, aws({"node_config": {"InstanceType": "p5.48xlarge"}}))
    assert found == NodeType("gpu", 4, 192.0, 8, "H100", 2048 * 2.0**30, 400e9, machine="p5.48xlarge")
    found = worker_of(tmp_path, aws({"resources": {"CPU": 32, "GPU": 4, "accelerator_type:A100-80G": 1}}))
    assert (found.count, found.cpus, found.gpus, found.kind, found.network) == (4, 32.0, 4, "A100-80G", None)
    found = worker_of(tmp_path, gcp({"machineType": "a2-ultragpu-8g"}, CPU=96, GPU=8))
    assert (found.gpus, found.kind, found.network) == (8, "A100-80G", 12.5e9)
    accelerator = "projects/p/zones/z/acceleratorTypes/nvidia-tesla-t4"
    node = {
        "machineType": "n1-standard-8",
        "guestAccelerators": [{"acceleratorType": accelerator, "acceleratorCount": 2}],
    }
    found = worker_of(tmp_path, gcp(node, CPU=8))
    assert (found.cpus, found.gpus, found.kind) == (8.0, 2, "T4")
    # Without max_workers of its own a type may have all workers; the cluster's limit holds.
    assert worker_of(tmp_path, aws({"max_workers": 100, "resources": {"CPU": 1}})).count == 8


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_a_manifest_names_the_gpu_in_its_node_selector(tmp_path: Path, kind: str) -> None:
    configuration = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"}}
    selector = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    found = worker_of(tmp_path, configuration, kuberay(kind, selector))
    assert found == NodeType("gpu", 4, 64.0, 8, "H100", 1000 * 2.0**30)


@pytest.mark.parametrize(
    ("selector", "group", "expected"),
    [
        ({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}, {}, "A100-80G"),
        ({"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}, {}, "A100-40G"),
        ({"node.kubernetes.io/instance-type": "p5en.48xlarge"}, {}, "H200"),
        ({}, {"rayStartParams": {"resources": '"{\\"accelerator_type:B200\\": 1}"'}}, "B200"),
        ({}, {"resources": {"accelerator_type:L4": "1"}}, "L4"),
    ],
)
def test_a_kind_of_gpu_has_many_names(tmp_path: Path, selector: dict, group: dict, expected: str) -> None:
    found = worker_of(tmp_path, kuberay(selector=selector, **group))
    assert (found.kind, found.gpus, found.cpus) == (expected, 8, 64.0)


def test_machines_that_ray_asks_need_a_kind_on_the_command_line(tmp_path: Path, config) -> None:  # noqa: F811
    local = {"provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}}
    path = write(tmp_path, local)
    assert read_node_types(path) == [NodeType("head", 1, head=True), NodeType("workers", 2)]
    wide = changed(changed(config, "resources", cpus_per_worker=1.0), "training", batch_size=32)
    with pytest.raises(UserError, match=r"workers: found a node without resources, .* --gpus KIND:COUNT"):
        plan_on_cluster(wide, path, Terms())
    (found,) = plan_on_cluster(wide, path, read_terms("H100:8", None, [], None))
    assert (found.plan.layout.workers, found.nodes, found.plan.space.per_node) == (16, 2, 8)
    assert found.heading == "nodes           2 x workers; each with 8 H100, 400 Gbit/s between nodes, assumed"
    # CPUs of all hosts, the head's too.
    (found,) = plan_on_cluster(changed(wide, "resources", workers_per_node=4), path, Terms())
    assert (found.plan.layout.workers, found.plan.layout.use_gpu) == (8, False)


def test_a_head_without_gpus_takes_no_rank_and_has_a_price(tmp_path: Path, config) -> None:  # noqa: F811
    wide = changed(config, "training", batch_size=64)
    path = write(tmp_path, aws({"node_config": {"InstanceType": "p4de.24xlarge"}}))
    (found,) = plan_on_cluster(wide, path, read_terms(None, None, ["gpu=40", "head=0.5"], None))
    assert (found.plan.layout.workers, found.nodes, found.price) == (32, 4, 160.5)
    assert found.plan.space.limit == GPUS["A100-80G"].gib * 2**30
    assert found.plan.space.figures == gpu_figures("A100-80G", 8, 50e9)
    (found,) = plan_on_cluster(wide, path, read_terms(None, 800.0, ["40"], None))
    assert (found.price, found.plan.space.figures.far_bandwidth) == (160.0, gpu_figures("A100", 8, 100e9).far_bandwidth)
    (found,) = plan_on_cluster(wide, path, Terms())
    assert found.price is None
    # With one CPU for each worker, eight GPUs take eight.
    two = changed(wide, "resources", workers=2)
    (found,) = plan_on_cluster(two, path, read_terms(None, None, ["40"], None))
    assert (found.plan.layout.workers, found.nodes, found.price) == (2, 1, 40.0)


def test_nodes_without_gpus_matter_only_where_there_are_no_others(tmp_path: Path, config) -> None:  # noqa: F811
    values = aws({"node_config": {"InstanceType": "g6.12xlarge"}})
    values["available_node_types"]["cpu"] = {"resources": {}, "node_config": {"InstanceType": "t3.unknown"}}
    (found,) = plan_on_cluster(config, write(tmp_path, values), Terms())
    assert (found.plan.space.figures.kind, found.plan.space.places, found.plan.space.per_node) == ("L4", 16, 4)
    cpus = aws({"max_workers": 2, "node_config": {"InstanceType": "c7i.4xlarge"}})
    (found,) = plan_on_cluster(changed(config, "resources", cpus_per_worker=8.0), write(tmp_path, cpus), Terms())
    # Two of sixteen virtual CPUs, and the head of eight.
    assert (found.plan.space.places, found.plan.layout.use_gpu) == (5, False)


def test_each_kind_of_gpu_has_a_plan(tmp_path: Path, config) -> None:  # noqa: F811
    values = aws({"node_config": {"InstanceType": "p5.48xlarge"}})
    values["available_node_types"]["old"] = {"resources": {}, "node_config": {"InstanceType": "p4d.24xlarge"}}
    found = plan_on_cluster(changed(config, "training", batch_size=64), write(tmp_path, values), Terms())
    assert [one.plan.space.figures.kind for one in found] == ["H100", "A100-40G"]
    assert found[0].plan.tokens_per_second > found[1].plan.tokens_per_second > 0


def test_measured_figures_replace_those_of_the_data_sheet(tmp_path: Path, config) -> None:  # noqa: F811
    path = write(tmp_path, aws({"node_config": {"InstanceType": "p5.48xlarge"}}))
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps({"matrix_flops": 1e12, "far_bandwidth": 1e9}))
    (found,) = plan_on_cluster(config, path, read_terms(None, None, [], measured))
    figures = found.plan.space.figures
    sheet = gpu_figures("H100", 8, 400e9)
    assert (figures.matrix_flops, figures.far_bandwidth) == (1e12, 1e9)
    assert figures.attention_flops / figures.matrix_flops == pytest.approx(sheet.attention_flops / sheet.matrix_flops)
    assert figures.memory_bandwidth == sheet.memory_bandwidth
    assert "matrix_flops, far_bandwidth from" in found.plan.describe()
    for values, message in (
        ({"flops": 1}, "found 'flops', allowed: matrix_flops, "),
        ({"matrix_flops": "fast"}, "matrix_flops: found 'fast', allowed: a number above 0"),
        ({"matrix_flops": 0}, "matrix_flops: found '0', allowed: a number above 0"),
    ):
        measured.write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            plan_on_cluster(config, path, read_terms(None, None, [], measured))


def test_a_joined_cluster_is_reckoned_with_by_its_slowest_gpu(config) -> None:  # noqa: F811
    def kind(*kinds: str | None) -> str:
        nodes = tuple(Node(8.0, 2.0, None, 2.0**36, kind=one) for one in kinds)
        return plan_training(changed(config, "resources", workers=2), Capacity(nodes)).space.figures.kind

    assert [kind("A100-80G", "L4"), kind("B200"), kind("H100", None)] == ["L4", "B200", "H100"]
    # Neither has figures for bf16.
    assert [kind(None), kind("V100")] == ["H100", "H100"]
    there = live_nodes([{"Resources": {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100-80G": 1.0}}])
    assert (there[0].kind, there[0].gpu_memory) == ("A100-80G", 80 * 2.0**30)


def test_a_run_reckons_with_what_was_measured(tmp_path: Path, config) -> None:  # noqa: F811
    """``raylm plan`` with the option and without a cluster, and ``auto`` with the key."""
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps({"broken": False, "figures": {"matrix_flops": 1e9, "launch_seconds": 1e-3}}))
    plain = describe_plan(config, None, Terms())
    said = describe_plan(config, None, read_terms(None, None, [], measured))
    assert f"matrix_flops, launch_seconds from {measured}" in said and "from" not in plain.split("speed")[0]
    keyed = changed(config, "resources", measured=str(measured))
    nodes = Capacity((Node(2.0),))
    assert plan_training(keyed, nodes).space.figures.matrix_flops == 1e9
    assert plan_training(keyed, nodes).candidates[0].seconds > plan_training(config, nodes).candidates[0].seconds
    for text, message in (
        (None, r"^resources\.measured: .*not found, allowed: a JSON file"),
        ("[1]", r"^resources\.measured: .*found no object"),
        ("{", r"^resources\.measured: .*not JSON"),
        ('{"flops": 1}', r"^resources\.measured: .*found 'flops', allowed: matrix_flops"),
    ):
        measured.unlink() if text is None else measured.write_text(text)
        with pytest.raises(UserError, match=message):
            plan_training(keyed, nodes)


def test_a_vocabulary_size_is_enough(tmp_path: Path, config, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    path = write(tmp_path, aws({"node_config": {"InstanceType": "p5.48xlarge"}}))
    absent = changed(config, "data", train="/nowhere/text.txt")
    # That of a tokenizer that is to be trained on the cluster stands in the file.
    (found,) = plan_on_cluster(absent, path, Terms())
    assert found.plan.model_config.vocab_size == 300
    (found,) = plan_on_cluster(absent, path, Terms(), vocab_size=1000)
    assert found.plan.model_config.vocab_size == 1000
    with pytest.raises(UserError, match=r"/nowhere/text\.txt"):
        make_plan(absent)
    file = tmp_path / "absent.yaml"
    file.write_text(yaml.safe_dump(absent.model_dump(mode="json")))
    command = ["plan", str(file), "--cluster", str(path), "--vocabulary", "777", "--price", "98.32"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "(vocabulary 777)" in printed
    assert "at $393 an hour for 4 nodes" not in printed
    assert "an hour for" in printed


def test_bad_input_is_one_line(tmp_path: Path, config, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    file = tmp_path / "plan.yaml"

    def refused(cluster: dict | None, *arguments: str) -> str:
        options = [] if cluster is None else ["--cluster", str(write(tmp_path, cluster))]
        assert main(["plan", str(file), *options, *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    p5 = {"node_config": {"InstanceType": "p5.48xlarge"}}
    unknown = aws({"node_config": {"InstanceType": "p9.48xlarge"}})
    assert "gpu: found p9.48xlarge, neither CPUs nor GPUs of which are known" in refused(unknown)
    named = aws({"resources": {"GPU": 8, "accelerator_type:X100": 1}})
    assert "available_node_types.gpu.resources: found GPU 'X100', allowed: K80" in refused(named)
    old = aws({"node_config": {"InstanceType": "p3.16xlarge"}})
    assert "gpu: found V100, allowed: a GPU with figures for bf16: T4" in refused(old)
    nameless = aws({"resources": {"GPU": 8}})
    assert "gpu: found 8 GPUs of a kind that is not named" in refused(nameless)
    assert "head_node_type: found 'boss', allowed: gpu, head" in refused(aws(p5, head_node_type="boss"))
    assert "max_workers: found -1, allowed: an integer from 0" in refused(aws(p5, max_workers=-1))
    small = refused(aws(p5), "resources.workers=64", "training.batch_size=64")
    assert "resources.workers: found 64" in small
    assert "at most 32" in small
    assert "found no nodes, allowed: a YAML file of Ray's cluster launcher" in refused({"cluster_name": "x"})
    assert "gpu.resources.GPU: found 'many', allowed: a number" in refused(kuberay(limits={"nvidia.com/gpu": "many"}))
    assert "--gpus: found 'X9:8', allowed: KIND:COUNT" in refused(None, "--gpus", "X9:8")
    assert "--price: found without --cluster and --gpus" in refused(None, "--price", "1")
    assert "--price: found 'cheap', allowed: dollars" in refused(aws(p5), "--price", "cheap")
    assert "--price: found a node type 'cpu', allowed: head, gpu" in refused(aws(p5), "--price", "cpu=3")
    assert "resources.workers: found auto, allowed with --gpus" in refused(None, "--gpus", "H100:8")


def test_workers_and_a_kind_of_gpu_make_a_cluster_without_a_file(config) -> None:  # noqa: F811
    many = changed(changed(config, "resources", workers=16), "training", batch_size=16)
    (found,) = plan_on_cluster(many, None, read_terms("A100-80G:8", 1600.0, ["10"], None), vocab_size=500)
    assert (found.plan.layout.workers, found.nodes, found.price) == (16, 2, 20.0)
    assert found.plan.space.figures == gpu_figures("A100-80G", 8, 4 * NETWORK)
