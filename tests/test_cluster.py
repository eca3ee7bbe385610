"""A cluster that is not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raylm.cluster.session import _start_ray, check_space, ray_files
from raylm.errors import RunFailure, UserError


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


def test_a_ray_that_comes_up_too_late_is_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    failures = ["The current node timed out during startup.\nsome raylet failed", "again"]

    def init(**options: object) -> None:
        assert options["address"] == "local"
        if failures:
            raise Exception(failures.pop(0))

    monkeypatch.setattr(ray, "init", init)
    _start_ray(dashboard=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Ray did not start: The current node timed out during startup. (the machine is busy?)")
    assert len(lines) == 2
    failures += ["one", "two", "three"]
    with pytest.raises(RunFailure, match="Ray did not start: three"):
        _start_ray(dashboard=False)
    # A cluster that others started is asked once. Without a token of its own: the session's Ray has one.
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(
        ray, "init", lambda **options: failures.append("asked") or (_ for _ in ()).throw(Exception("x"))
    )
    with pytest.raises(UserError, match=r"RAY_ADDRESS: found auto, allowed: .*: x; a cluster that wants a token needs"):
        _start_ray(dashboard=False)
    assert failures == ["asked"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match=r": x; is the token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH that of the"):
        _start_ray(dashboard=False)


def test_a_full_disk_for_rays_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "new"))
    assert ray_files() == tmp_path / "new" / "ray"
    check_space(ray_files())
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"TMPDIR: .*new/ray, found \d+ MB free, allowed: 1000000000000 MB or more"):
        check_space(ray_files(), least=10**18)
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/x")
    with pytest.raises(UserError, match=r"TMPDIR: .*/dev/null/x/ray, which is not writable; export RAY_TMPDIR"):
        check_space(ray_files())
