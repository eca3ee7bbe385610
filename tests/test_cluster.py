"""A cluster that is not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_answer_is_refused_at_once(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {i}" for i in range(20)))
    values = {
        "run": {"name": "data", "storage": str(tmp_path)},
        "data": {"train": str(tmp_path / "text.txt"), "text_unit": "line"},
        "tokenizer": {"type": "byte"},
    }
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(values))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{closed.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-m", "raylm.cli", "prepare", str(tmp_path / "prepare.yaml")],
            env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if not line.endswith("…")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith(f"raylm: error: RAY_ADDRESS: found {address}, allowed: ")
    assert not (tmp_path / "data").exists()
