"""Folders that other nodes do not see are refused; a Ray cluster of two nodes, real tasks on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from raylm.errors import UserError
from raylm.training.ray_train.sharing import check_shared

folder = Path(sys.argv[1])
(folder / "data").mkdir()
# Through its own table of open files this process alone sees the folder.
private = Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}")
said = {}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_name": "first"})
cluster.add_node(num_cpus=1, node_name="second")
cluster.connect()
cases = {
    "shared": (folder / "new" / "runs", {"data.train": folder / "data"}),
    "private storage": (private, {}),
    "private data": (None, {"data.train": private / "data"}),
}
for name, (storage, inputs) in cases.items():
    try:
        said[name] = check_shared(storage, inputs)
    except UserError as error:
        said[name] = str(error)
ray.shutdown()
print(json.dumps([said, sorted(os.listdir(folder)), str(private)]))
cluster.shutdown()
"""


@pytest.mark.slow
def test_folders_that_other_nodes_do_not_see_are_refused(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said, left, private = json.loads(result.stdout.splitlines()[-1])
    assert said["shared"] is None
    for name, key in (("private storage", "run.storage"), ("private data", "data.train")):
        assert said[name].startswith(f"{key}: found {private}"), said
        assert "not seen by node first (" in said[name], said
        assert "and 1 more, allowed" in said[name], said
    # No probe file and no folder stays.
    assert left == ["data"]
