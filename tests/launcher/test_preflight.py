"""The preflight's probe on this machine, and what its record means; three real hosts are in test_real_hosts.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from raylm.launcher.preflight import worker
from raylm.launcher.preflight.figures import figures
from raylm.launcher.preflight.judge import all_reduce_line, judge, rows, workers_line
from raylm.launcher.preflight.probe import NodeProbe

GB = 10**9
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")


def sound() -> dict[str, Any]:
    """What the driver says of three nodes without a fault."""
    nodes = [
        {
            "address": address, "name": address, "id": address, "head": address == ADDRESSES[0],
            "resources": {"CPU": 8.0}, "python": "3.12.1", "packages": {"ray": "2.60.0", "torch": "2.13.0"},
            "cuda": "13.0", "gpus": [], "cpus": 8, "cpu": "a CPU", "memory": 64 * GB,
            "disk": {"free": 100 * GB, "total": 200 * GB}, "shared_memory": {"free": 30 * GB, "total": 32 * GB},
            "storage": {"free": 500 * GB, "total": 900 * GB}, "open_files": 65536, "token": True,
        }
        for address in ADDRESSES
    ]  # fmt: skip
    pairs = [(source, to) for source in ADDRESSES for to in ADDRESSES if source != to]
    return {
        "nodes": nodes,
        "folder": "/shared",
        "storage": {address: {"refused": "", "unseen": []} for address in ADDRESSES},
        "clock": {address: {"ahead": 0.01, "within": 0.001} for address in ADDRESSES},
        "links": [{"from": source, "to": to, "latency": 5e-5} for source, to in pairs],
        "rates": [{"from": source, "to": to, "rate": 1.2 * GB} for source, to in pairs],
        "products": {address: {"float32": 800e9, "bfloat16": 1.6e12} for address in ADDRESSES},
        "all_reduce": {"backend": "gloo", "nodes": 3, "seconds": {"1024": 1e-3, "67108864": 0.1}},
    }


def broken(record: dict[str, Any], *, wanted: tuple[str, ...] = ADDRESSES) -> dict[tuple[str, str], str]:
    return {(one.node, one.finding.what): one.finding.found for one in judge(record, list(wanted), {})}


def test_a_sound_cluster_has_no_finding() -> None:
    assert broken(sound()) == {}
    table = rows(sound())
    assert table[1] == ("10.0.0.1 (head)", "8", "64 GB", "-", "100 GB", "500 GB", "+10 ms", "1.20 GB/s", "1.6 TFLOP/s")
    assert all_reduce_line(sound()) == "all-reduce over 3 nodes (gloo): 1 KiB 1.00 ms, 64 MiB 100.00 ms"


def test_a_node_that_did_not_come() -> None:
    assert broken(sound(), wanted=(*ADDRESSES, "10.0.0.4")) == {("10.0.0.4", "node"): "not in the cluster"}


def test_other_versions() -> None:
    record = sound()
    record["nodes"][2]["packages"]["torch"] = "2.12.0"
    record["nodes"][1]["python"] = "3.11.9"
    assert broken(record) == {
        ("10.0.0.3", "packages"): "torch 2.12.0; 2 of 3 nodes have 2.13.0",
        ("10.0.0.2", "packages"): "python 3.11.9; 2 of 3 nodes have 3.12.1",
    }
    here = judge(sound(), [], {"ray": "2.59.0"})
    assert [(one.node, one.finding.found, one.finding.state) for one in here] == [
        ("cluster", "ray 2.60.0 on the nodes, 2.59.0 on this machine", "broken")
    ]


def test_a_full_disk_also_of_a_node_that_says_nothing() -> None:
    record = sound()
    record["nodes"][1]["disk"] = {"free": 6 * GB, "total": 200 * GB}
    silent = {name: record["nodes"][2][name] for name in ("address", "name", "id", "head", "resources")}
    record["nodes"][2] = {**silent, "error": "no answer", "disk": {"free": 0, "total": 50 * GB}}
    assert broken(record) == {
        ("10.0.0.2", "disk"): "6.0 GB of 200 GB free where Ray writes",
        ("10.0.0.3", "node"): "no answer",
        ("10.0.0.3", "disk"): "0.00 GB of 50 GB free where Ray writes",
    }


def test_only_the_node_apart_is_blamed_for_the_folder() -> None:
    record = sound()
    record["storage"] |= {
        "10.0.0.1": {"refused": "", "unseen": ["10.0.0.3"]},
        "10.0.0.2": {"refused": "", "unseen": ["10.0.0.3"]},
        "10.0.0.3": {"refused": "", "unseen": ["10.0.0.1", "10.0.0.2"]},
    }
    assert broken(record) == {
        ("10.0.0.3", "storage"): "/shared is not shared: files of 10.0.0.1, 10.0.0.2 are not there"
    }
    record = sound()
    record["storage"]["10.0.0.2"]["refused"] = "Read-only file system"
    assert broken(record) == {("10.0.0.2", "storage"): "/shared cannot be written: Read-only file system"}


def test_only_the_node_behind_the_firewall_is_blamed() -> None:
    record = sound()
    for link in record["links"]:
        if link["to"] == "10.0.0.3":
            del link["latency"]
            link["error"] = "timed out"
    found = broken(record)
    assert list(found) == [("10.0.0.3", "ports")]
    assert "10.0.0.1, 10.0.0.2" in found["10.0.0.3", "ports"]


@pytest.mark.parametrize(
    ("rate", "said"), [(5e6, "5.0 MB/s to its best neighbour"), (0.3e9, "0.30 GB/s; the others have 1.20 GB/s")]
)
def test_a_slow_link_one_way(rate: float, said: str) -> None:
    record = sound()
    for one in record["rates"]:
        if one["from"] == "10.0.0.2":
            one["rate"] = rate
    assert broken(record) == {("10.0.0.2", "network"): said}


def test_clock_speed_limits_and_access() -> None:
    record = sound()
    record["clock"]["10.0.0.2"]["ahead"] = -90.0
    record["products"]["10.0.0.3"]["float32"] = 100e9
    record["nodes"][0]["open_files"] = 1024
    record["nodes"][1]["token"] = False
    assert broken(record) == {
        ("10.0.0.2", "clock"): "90.0 s behind the head's",
        ("10.0.0.3", "speed"): "100 GFLOP/s; the others have 800 GFLOP/s",
        ("10.0.0.1", "open files"): "at most 1,024",
        ("cluster", "access"): "no token: whoever reaches its ports may run code on it",
    }


def test_gpus() -> None:
    record = sound()
    for node in record["nodes"]:
        node["gpus"] = [{"name": "NVIDIA H100", "memory": 80 * GB, "used": 1 * GB}] * 8
        node["resources"]["GPU"] = 8.0
    assert broken(record) == {}
    other = copy.deepcopy(record)
    other["nodes"][1]["cuda"] = None
    other["nodes"][2]["gpus"][3] = {"name": "NVIDIA H100", "memory": 80 * GB, "used": 40 * GB}
    assert broken(other) == {
        ("10.0.0.2", "gpus"): "torch is a CPU build",
        ("10.0.0.3", "gpus"): "40 GB of GPU 3 are in use",
    }
    assert "matrix_flops" not in figures(record)


def test_figures_for_a_plan() -> None:
    found = figures(sound())
    assert found["matrix_flops"] == 100e9
    # 2 (n - 1) / n of 64 MiB in 0.1 s, shared by eight CPUs.
    assert found["far_bandwidth"] == pytest.approx(4 / 3 * 67108864 / 0.1 / 8)
    assert found["collective_seconds"] == 1e-3


def test_figures_of_workers_that_computed_at_once() -> None:
    record = sound()
    names = ("matrix_flops", "attention_flops", "memory_bandwidth", "launch_seconds")
    rates = {
        f"{address} {n}": dict(zip(names, (rate, rate / 2, 5e9, 1e9 / rate), strict=True))
        for address, speeds in zip(ADDRESSES, ((50e9, 70e9), (20e9, 40e9), (90e9, 90e9)), strict=True)
        for n, rate in enumerate(speeds)
    }
    near = {"1024": 2e-4, "4194304": 0.004}
    record["workers"] = {
        "count": 2, "threads": 1, "rates": rates, "near": dict.fromkeys(ADDRESSES, near) | {"10.0.0.3": {
            "1024": 3e-4, "4194304": 0.008}}, "far": {"1024": 5e-4, "4194304": 0.02},
    }  # fmt: skip
    found = figures(record)
    # The slowest node's mean.
    assert found["matrix_flops"] == pytest.approx(30e9)
    assert found["attention_flops"] == pytest.approx(15e9)
    assert found["launch_seconds"] == pytest.approx((1 / 20 + 1 / 40) / 2)
    assert found["near_bandwidth"] == pytest.approx(4194304 / 0.008)
    # 2 (n - 1) / n of 4 MiB over six workers, two of which share a node's network.
    assert found["far_bandwidth"] == pytest.approx(10 / 6 * 4194304 / 0.02 / 2)
    assert found["collective_seconds"] == 3e-4
    line = workers_line(record)
    assert line == (
        "2 workers a node at once, the slowest: products 20 GFLOP/s, attention 10 GFLOP/s, memory 5.00 GB/s"
    )
    record["workers"] = {"count": 2, "threads": 1, "error": "its process died"}
    assert figures(record) == figures(sound())
    assert workers_line(record) == "2 workers a node at once: its process died"


def test_a_worker_is_timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SECONDS", 0.05)
    one = worker.WorkerProbe()
    one.start(1)
    rates = one.rates()
    assert 1e8 < rates["attention_flops"] < 1e13
    assert 1e9 < rates["matrix_flops"] < 1e13
    assert 1e8 < rates["memory_bandwidth"] < 1e12
    assert 1e-7 < rates["launch_seconds"] < 1e-2


def test_the_probe_here(tmp_path: Path) -> None:
    one, other = NodeProbe(), NodeProbe()
    facts = one.facts(str(tmp_path), str(tmp_path / "not" / "there"))
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"]["torch"]
    assert facts["disk"]["free"] > 0
    port = one.listen()
    assert 0 < other.link("127.0.0.1", port, 5.0)["latency"] < 0.1
    assert other.rate("127.0.0.1", port, 5.0) > 1e6
    closed = one.free_port()
    assert other.link("127.0.0.1", closed, 1.0) == {"error": "Connection refused"}


def test_the_probe_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = NodeProbe()
    assert one.write(str(tmp_path / "new"), "a") == ""
    (tmp_path / "file").write_text("")
    assert one.write(str(tmp_path / "file"), "a") == "File exists"
    assert one.missing(str(tmp_path / "new"), ["a"]) == []
    assert one.missing(str(tmp_path / "new"), ["a", "b"]) == ["b"]
    one.remove(str(tmp_path / "new"), ["a", "b"])
    assert list((tmp_path / "new").iterdir()) == []
