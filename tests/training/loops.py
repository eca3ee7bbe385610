"""Runs of the training loop in plain processes: see ``loop_process.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300.0


def run_case(config: Path, *overrides: str, workers: int = 1, stage: str = "pretrain") -> dict[str, Any]:
    """One of the ``cases`` of :func:`run_loops`."""
    return {"config": str(config), "overrides": list(overrides), "workers": workers, "stage": stage}


def run_loops(*cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of the runs returned, one after the other: the final metrics, or ``failure``."""
    with tempfile.TemporaryDirectory() as directory:
        given, found = Path(directory, "cases.json"), Path(directory, "results.json")
        given.write_text(json.dumps(cases))
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("loop_process.py")), str(found), str(given)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **own_ray()}, timeout=PATIENCE_SECONDS,
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(found.read_text())


def own_ray() -> dict[str, str]:
    """What leads a process to the Ray of this session, where it has one: several may run on the machine."""
    ray = sys.modules.get("ray")
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray and ray.is_initialized() else {}
