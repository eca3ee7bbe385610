"""Nothing of what is done with raylm is told to anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from raylm.cluster.environment import worker_environment
from raylm.telemetry import VARIABLES

# nncf is silent under pytest: so a process of its own.
EXPORT = """
import sys
from pathlib import Path
from raylm.compression.exporters.openvino import export_model
export_model(sys.argv[1], Path(sys.argv[2]))
import multiprocessing
print("children", len(multiprocessing.active_children()))
"""


def test_an_export_sends_nothing(tiny_model: Path, tmp_path: Path) -> None:
    home, output = tmp_path / "home", tmp_path / "openvino"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NNCF_CI", "NNCF_DEV")}
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tiny_model), str(output)],
        env=environment | {"HOME": str(home)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert any(output.glob("*.xml"))
    # Whoever sends makes an id there first.
    assert not (home / "intel").exists()
    assert done.stdout.splitlines()[-1] == "children 0"


def test_workers_send_nothing() -> None:
    assert VARIABLES.items() <= worker_environment(1).items()
