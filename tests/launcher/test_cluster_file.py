"""Cluster files: what is refused before anything starts, and what raylm reads of them."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylm.errors import UserError
from raylm.launcher.cluster_file import check_mounts, check_reached, read_cluster_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What cluster/local.yaml says, with a key that is there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text("")
    found = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    found["auth"]["ssh_private_key"] = str(tmp_path / "key")
    return found


def write(directory: Path, values: Any) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_what_it_says(values: dict[str, Any], tmp_path: Path) -> None:
    cluster = read_cluster_file(write(tmp_path, values))
    assert (cluster.name, cluster.head, cluster.workers) == ("raylm", "10.0.0.1", ["10.0.0.2", "10.0.0.3"])
    assert cluster.least_nodes == 3
    assert cluster.sends_token
    assert cluster.on_node("ray status", head=True) == ". ~/raylm/cluster/node.sh; ray status"
    ssh = cluster.ssh("10.0.0.2", "ray stop")
    assert ssh[-2:] == ["ubuntu@10.0.0.2", "bash --login -c 'ray stop'"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_those_of_clouds(name: str) -> None:
    cluster = read_cluster_file(ROOT / "cluster" / name)
    assert not cluster.is_local
    assert cluster.head is None
    assert cluster.least_nodes == 1
    assert cluster.sends_token
    assert "ray status" in cluster.on_node("ray status", head=True)


def local(**keys: Any) -> dict[str, Any]:
    return {"type": "local", **keys}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("provider:\n  - [\n", "cluster.yaml:3: found no YAML"),
        ("[]", "found no provider.type"),
        ({"provider": local(worker_ips=[])}, "provider.head_ip: found None, allowed: the head's address"),
        ({"provider": local(head_ip="a", worker_ips="b")}, "provider.worker_ips: found b, allowed: a list"),
        ({"provider": local(head_ip="a", worker_ips=["a"])}, "found a twice, allowed: each machine once"),
        ({"auth": {}}, "auth.ssh_user: found none"),
        ({"auth": {"ssh_user": "u", "ssh_private_key": "/no/key"}}, "ssh_private_key: found /no/key, which"),
        ({"available_node_types": {"a": {}}}, "available_node_types: found a value"),
        ({"setup_comands": []}, "setup_comands"),
        ({"setup_commands": "one"}, "setup_commands: 'one' is not of type 'array'"),
        ({"apiVersion": "ray.io/v1", "kind": "RayCluster"}, "found a manifest of Kubernetes"),
        ("apiVersion: v1\n---\napiVersion: ray.io/v1\n", "found a manifest of Kubernetes"),
        ("a: 1\n---\nb: 2\n", "found no provider.type"),
        ("", "found no provider.type"),
    ],
)  # fmt: skip
def test_what_is_refused(values: dict[str, Any], tmp_path: Path, change: Any, said: str) -> None:
    path = write(tmp_path, change if isinstance(change, str) else values | change)
    with pytest.raises(UserError) as refused:
        read_cluster_file(path)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_token_is_made_once_and_for_its_owner(values: dict[str, Any], tmp_path: Path) -> None:
    values["file_mounts"] = {"~/.ray/auth_token": "~/.ray/auth_token"}
    cluster = read_cluster_file(write(tmp_path, values))
    check_mounts(cluster)
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    first = token.read_text()
    assert len(first) == 64
    check_mounts(cluster)
    assert token.read_text() == first
    values["file_mounts"]["~/data"] = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"file_mounts: found .*gone, which is not there"):
        check_mounts(read_cluster_file(write(tmp_path, values)))


def test_a_machine_that_does_not_let_in(values: dict[str, Any], tmp_path: Path) -> None:
    values["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    # Nobody listens there.
    values["auth"]["ssh_proxy_command"] = "false"
    with pytest.raises(UserError, match=r"127\.0\.0\.1 does not let ubuntu in over ssh: "):
        check_reached(read_cluster_file(write(tmp_path, values)))
