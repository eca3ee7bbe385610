"""A cluster on this machine whose autoscaler starts nodes: Ray's own, with its fake provider.

The nodes are processes of this machine, the autoscaler and all that asks it are real
(https://docs.ray.io/en/latest/ray-contribute/fake-autoscaler.html). ``ray.cluster_utils.AutoscalingCluster`` does the
same, but ends every other Ray of the machine first.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

START_SECONDS = 90.0
# The provider's own name of the head's type.
HEAD_TYPE = "ray.head.default"
SETTINGS = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "15"}
# In the environment of all processes of a cluster, by which its end finds them.
MARK = "RAYLM_TESTS_CLUSTER"


def configuration(types: dict[str, dict[str, Any]], port: int = 0, head_cpus: int = 0) -> dict[str, Any]:
    """What ``ray start --autoscaling-config`` takes.

    Args:
        types: name -> ``resources`` and ``max_workers``.
    """
    kinds = {name: {"node_config": {}, "min_workers": 0, **one} for name, one in types.items()}
    head = {HEAD_TYPE: {"node_config": {}, "min_workers": 0, "max_workers": 0, "resources": {"CPU": head_cpus}}}
    lists = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands",
             "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude",
             "rsync_filter")  # fmt: skip
    return {
        "cluster_name": "fake",
        "max_workers": 8,
        "idle_timeout_minutes": 1,
        "upscaling_speed": 100,
        "provider": {
            "type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "launch_multiple": True,
            "disable_node_updaters": True, "disable_launch_config_check": True, "use_node_id_as_ip": True,
        },
        "available_node_types": kinds | head,
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {},
        **{name: [] for name in lists},
    }  # fmt: skip


class Cluster(NamedTuple):
    """Where a cluster is reached: its ``RAY_ADDRESS``, and the URL of its dashboard."""

    address: str
    dashboard: str


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def autoscaling_cluster(folder: Path, types: dict[str, dict[str, Any]], head_cpus: int = 0) -> Iterator[Cluster]:
    """A new cluster whose head alone is there; it and its nodes are gone after the block."""
    port, dashboard = _free_port(), _free_port()
    (folder / "cluster.json").write_text(json.dumps(configuration(types, port, head_cpus)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mark = secrets.token_hex(8)
    with (folder / "cluster.log").open("w") as log:
        head = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
                "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={head_cpus}",
                f"--dashboard-port={dashboard}", f"--autoscaling-config={folder / 'cluster.json'}",
                "--object-store-memory=100000000",
            ],
            env={**environment, **SETTINGS, MARK: mark},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (folder / "cluster.log").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (folder / "cluster.log").read_text()
            time.sleep(0.2)
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    finally:
        for process in _marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def nodes_of(address: str) -> list[psutil.Process]:
    """The processes of the nodes that the autoscaler of the cluster has started (raylets), in order of their age."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        options = process.info["cmdline"] or []
        if f"--gcs-address={address}" in options and options[0].endswith("raylet") and "--head" not in options:
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])
