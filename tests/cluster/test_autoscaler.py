"""What a cluster may still get, and a run on nodes that were not there; Ray's autoscaler with its fake provider."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from raylm.cluster.autoscaler import MANY, Autoscaler, NodeType, from_configuration
from raylm.cluster.capacity import Capacity, Node, startable
from raylm.cluster.waiting import awaited
from raylm.config.run import ResourcesSection
from raylm.training.reports.events import read_events
from raylm.training.reports.metrics import read_metrics
from tests.cluster.fake_autoscaler import Cluster, autoscaling_cluster, configuration, nodes_of

PATIENCE_SECONDS = 200.0
HEAD = {"NodeID": "head", "Resources": {"CPU": 4.0, "node:__internal_head__": 1.0}}


def test_types_are_read_from_the_file_of_ray_up() -> None:
    kinds = {
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3},
        "any": {"resources": {"CPU": 2}},
        "none": {"resources": {"CPU": 2}, "max_workers": 0},
    }
    found = from_configuration(configuration(kinds) | {"max_workers": 5})
    assert found == Autoscaler(
        (NodeType("gpu", {"CPU": 8, "GPU": 1}, 3), NodeType("any", {"CPU": 2}, 5)),
        5,
    )
    assert from_configuration({}) == Autoscaler((), MANY)


def test_what_runs_already_is_not_started_again() -> None:
    autoscaler = Autoscaler((NodeType("a", {"CPU": 2}, 2), NodeType("b", {"CPU": 8, "GPU": 1}, 2)), 3)
    named = {"Resources": {"CPU": 2.0}, "Labels": {"ray.io/node-group": "a"}}
    # Without a label, a node is of the type that has as much.
    unnamed = {"Resources": {"CPU": 8.0, "GPU": 1.0}, "Labels": {}}
    assert startable(autoscaler, [HEAD]) == [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}, {"CPU": 2}]
    assert startable(autoscaler, [HEAD, named]) == [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}]
    assert startable(autoscaler, [HEAD, named, unnamed]) == [{"CPU": 8, "GPU": 1}]
    assert startable(autoscaler, [HEAD, named, unnamed, unnamed]) == []


def test_nodes_that_can_start_count_and_are_asked_for_where_they_are_needed() -> None:
    capacity = Capacity((Node(4.0), Node(4.0, there=False), Node(8.0, 2.0, there=False)))
    resources = ResourcesSection(workers=6, gpus_per_worker=0)
    assert capacity.places(resources) == 16
    assert capacity.missing(4, resources) == ()
    # Not the one with GPUs, which needs none.
    assert capacity.missing(6, resources) == (Node(4.0, there=False),)
    assert len(capacity.missing(9, resources)) == 2


def test_a_head_without_gpus_or_cpus_holds_no_rank() -> None:
    head, gpu_node = Node(16.0), Node(8.0, 4.0, there=False)
    on_gpus = ResourcesSection()
    assert Capacity((head, gpu_node)).uses_gpus(on_gpus)
    assert Capacity((head, gpu_node)).places(on_gpus) == 4
    assert Capacity((head, gpu_node)).missing(1, on_gpus) == (gpu_node,)
    assert Capacity((Node(0.0), Node(2.0))).places(ResourcesSection()) == 2


def test_what_is_waited_for_is_said_by_kind() -> None:
    missing = (Node(4.0), Node(4.0), Node(8.0, 1.0))
    assert awaited(missing, [{"CPU": 4.0}]) == (
        "2 nodes with 4 CPUs each: 1 of 2 there; 1 node with 8 CPUs and 1 GPU: 0 of 1 there"
    )
    assert awaited((Node(1.0),), [{"CPU": 1.0}, {"CPU": 1.0}]) == "1 node with 1 CPU: 1 of 1 there"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head without CPUs, and up to three nodes with one CPU each that are not there yet."""
    with autoscaling_cluster(tmp_path, {"small": {"resources": {"CPU": 1}, "max_workers": 3}}) as started:
        yield started


def run_on(cluster: Cluster, tmp_path: Path, name: str, steps: int, **resources: object) -> subprocess.Popen[str]:
    """Begin the training of a tiny model on text, whose batch two workers share."""
    (tmp_path / "text.txt").write_text("\n".join(f"{i} apples and {i * i} pears" for i in range(300)))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {
        "run": {"name": name, "storage": str(tmp_path)},
        "data": {"train": str(tmp_path / "text.txt"), "text_unit": "line", "validation_fraction": 0.1},
        "tokenizer": {"type": "byte"},
        "model": {"family": "llama", "config": {**size, "num_key_value_heads": 2}},
        "training": {"steps": steps, "batch_size": 4, "sequence_length": 32, "log_every_steps": 1, "precision": "fp32"},
        "resources": resources,
        "checkpoint": {"every_steps": 20, "every_seconds": None},
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "raylm.cli", "pretrain", str(tmp_path / f"{name}.yaml")],
        env=environment | {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end_node(raylet: psutil.Process) -> None:
    """As a host is lost: all of a node's processes at once."""
    for process in [*raylet.children(recursive=True), raylet]:
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_run_has_its_nodes_started_and_goes_on_where_one_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    driver = run_on(cluster, tmp_path, "run", 400, workers=2)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE_SECONDS
    while not (lines := read_metrics(metrics)) or lines[-1]["step"] < 45:
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()
        time.sleep(0.05)
    nodes = nodes_of(cluster.address)
    assert len(nodes) >= 2
    training = [node for node in nodes if any("RayTrainWorker" in " ".join(p.cmdline()) for p in node.children())]
    end_node(training[-1])
    try:
        _, errors = driver.communicate(timeout=PATIENCE_SECONDS)
    finally:
        driver.kill()
    assert driver.returncode == 0, errors[-3000:]
    assert "pretrain: waiting for 1 node with 1 CPU: 0 of 1 there" in errors
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 401))
    restarts = [event["text"] for event in read_events(tmp_path / "run") if event["kind"] == "restart"]
    assert len(restarts) == 1
    assert " was lost with rank " in restarts[0], restarts
    logs = tmp_path / "run" / "logs"
    (said,) = logs.glob("driver-*.txt")
    assert restarts[0] in said.read_text()
    (reason,) = logs.glob("*-rank-*/reason.txt")
    assert "process " in reason.read_text()
    # The dashboard's Train tab has the run.
    with urllib.request.urlopen(f"{cluster.dashboard}/api/train/v2/runs/v1", timeout=60) as answer:
        (shown,) = json.load(answer)["train_runs"]
    assert shown["name"].startswith("run-") and shown["status"] == "FINISHED"


@pytest.mark.slow
def test_more_than_the_cluster_can_get_is_refused_and_the_wait_has_an_end(cluster: Cluster, tmp_path: Path) -> None:
    _, errors = run_on(cluster, tmp_path, "large", 10, workers=4).communicate(timeout=PATIENCE_SECONDS)
    assert "resources.workers: found 4 with 1 CPUs each, allowed: at most 3, as the cluster" in errors
    assert "waiting" not in errors and not nodes_of(cluster.address)
    # The file allows what nobody starts.
    for process in psutil.process_iter(["cmdline"]):
        options = process.info["cmdline"] or []
        if f"--autoscaling-config={tmp_path / 'cluster.json'}" in options and "monitor.py" in " ".join(options):
            process.send_signal(signal.SIGSTOP)
    driver = run_on(cluster, tmp_path, "late", 10, workers=2, node_wait_seconds=5)
    _, errors = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 1, errors[-2000:]
    assert errors.splitlines()[-1].startswith(
        "raylm: failed: resources.node_wait_seconds: after 5 s the cluster has not started"
    )
    assert not (tmp_path / "late").exists()
