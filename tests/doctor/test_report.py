"""The table, its exit status, and a real run on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from raylm.doctor.finding import Finding
from raylm.doctor.report import PROBES, examine, summary, table

ROOT = Path(__file__).resolve().parents[2]


def test_table_fits_and_names_the_remedy() -> None:
    findings = [
        Finding("python", "3.12.1"),
        Finding(
            "disk", "working directory /" + "a/" * 30 + ": 0.50 GB of 100 GB free", "broken", "free some space " * 8
        ),
    ]
    lines = table(findings, 80).splitlines()
    assert lines[0] == "ok       python  3.12.1"
    assert max(map(len, lines)) <= 80
    assert sum("->" in line for line in lines) == 1
    assert "\033[31mbroken" in table(findings, 80, color=True)
    assert summary(findings) == "broken: disk"
    assert summary([Finding("a", "b", "warning", "c")]) == "nothing is broken; 1 warning"


def test_a_probe_that_fails_hides_nothing() -> None:
    def odd() -> list[Finding]:
        raise ValueError("an odd machine")

    found = examine({"odd": odd, "even": lambda: [Finding("even", "fine")]})
    assert [(finding.what, finding.state) for finding in found] == [("odd", "warning"), ("even", "ok")]
    assert "an odd machine" in found[0].found


def test_this_machine(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "raylm.cli", "doctor", "--json"],
        cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert time.monotonic() - began < 45
    told = json.loads(result.stdout)
    states = {finding["what"]: finding["state"] for finding in told["findings"]}
    assert {"python", "torch", "ray", "memory", "disk", "ray start", "port 8000", "host name", "text"} <= set(states)
    broken = [what for what, state in states.items() if state == "broken"]
    assert (result.returncode, told["broken"]) == (1 if broken else 0, len(broken))
    assert states["torch"] != "broken" and states["ray"] != "broken"
    assert all(finding["remedy"] for finding in told["findings"] if finding["state"] != "ok")


def test_a_cluster_that_is_not_there_is_broken(tmp_path: Path) -> None:
    """And where no package is: the standard library alone tells it (``-S`` leaves site-packages out)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-S", "-m", "raylm.doctor"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "RAY_ADDRESS=127.0.0.1:9" in result.stdout
    assert "python -m pip install torch" in result.stdout.replace("'", "")
    assert result.stdout.splitlines()[-1].startswith("broken: torch, ray, deepspeed, transformers")
    assert set(PROBES) >= {"python", "packages", "ray"}
