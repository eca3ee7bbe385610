"""The cluster file: what Ray's cluster launcher reads, and what of it raylm needs to know.

Its keys are Ray's (https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html).
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raylm.errors import UserError, first_line

LOCAL = "local"
TOKEN = "~/.ray/auth_token"
DASHBOARD_PORT = 8265
SSH_SECONDS = 10
# Ray's own options: machines of a cloud come and go, and with them their keys.
SSH_OPTIONS = (
    "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
    "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}",
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What a command on a machine wrote, and why it failed; empty where it did not."""

    output: str
    errors: str
    reason: str


def last_line(text: str) -> str:
    """The last line of ``text`` that is not empty, for one-line messages."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")


@dataclass(frozen=True)
class ClusterFile:
    """A cluster file that Ray's launcher takes.

    Attributes:
        path: of the file.
        values: what it says.
    """

    path: Path
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the cluster."""
        return self.values["cluster_name"]

    @property
    def is_local(self) -> bool:
        """Whether it names its machines."""
        return self.values["provider"]["type"] == LOCAL

    @property
    def head(self) -> str | None:
        """The head's address; None where a cloud gives it."""
        return self.values["provider"]["head_ip"] if self.is_local else None

    @property
    def workers(self) -> list[str]:
        """The workers' addresses; empty where a cloud gives them."""
        return list(self.values["provider"]["worker_ips"]) if self.is_local else []

    @property
    def machines(self) -> list[str]:
        """The addresses of all machines, the head first; empty where a cloud gives them."""
        return [self.head, *self.workers] if self.head is not None else []

    @property
    def least_nodes(self) -> int:
        """Nodes that come without any work, the head among them."""
        if self.is_local:
            return 1 + min(self.values.get("min_workers", len(self.workers)), len(self.workers))
        types = self.values["available_node_types"].items()
        return 1 + sum(kind.get("min_workers", 0) for name, kind in types if name != self.values["head_node_type"])

    @property
    def sends_token(self) -> bool:
        """Whether the nodes get the token without which they take nobody."""
        return any(Path(there).name == Path(TOKEN).name for there in self.values.get("file_mounts") or {})

    def on_node(self, command: str, *, head: bool) -> str:
        """``command`` as a line for a node's shell, with the surroundings that the file gives ``ray stop`` there."""
        lines = self.values.get(f"{'head' if head else 'worker'}_start_ray_commands") or []
        return next((line.replace("ray stop", command) for line in lines if "ray stop" in line), command)

    def ssh(self, address: str, line: str) -> list[str]:
        """What runs a shell's ``line`` on a machine."""
        auth = self.values["auth"]
        key = ["-i", str(Path(auth["ssh_private_key"]).expanduser())] if auth.get("ssh_private_key") else []
        proxy = ["-o", f"ProxyCommand={auth['ssh_proxy_command']}"] if auth.get("ssh_proxy_command") else []
        shell = shlex.join(["bash", "--login", "-c", line])
        return ["ssh", *SSH_OPTIONS, *key, *proxy, f"{auth['ssh_user']}@{address}", shell]

    def run_on(self, address: str, line: str, seconds: float) -> Ran:
        """Run a shell's ``line`` on a machine, for at most so many seconds."""
        try:
            done = subprocess.run(
                self.ssh(address, line), capture_output=True, text=True, errors="replace", timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return Ran("", "", f"no answer within {seconds:.0f} s")
        reason = last_line(done.stderr) or f"ended with status {done.returncode}"
        return Ran(done.stdout, done.stderr, reason if done.returncode else "")

    def failed_on(self, run: Callable[[str], Ran]) -> dict[str, str]:
        """Where ``run``, called with each machine's address at the same time, failed, and why."""
        with ThreadPoolExecutor(max_workers=16) as pool:
            results = zip(self.machines, pool.map(run, self.machines), strict=True)
            return {address: ran.reason for address, ran in results if ran.reason}


def read_cluster_file(path: Path) -> ClusterFile:
    """Read the cluster file at ``path``.

    Raises:
        UserError: it is none, or Ray's launcher would not take it; names the key.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"CLUSTER: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: found no YAML: {getattr(error, 'problem', None) or first_line(error)}") from None
    values = documents[0] if len(documents) == 1 else None
    if any(isinstance(one, dict) and "apiVersion" in one for one in documents):
        raise UserError(
            f"{path}: found a manifest of Kubernetes, allowed: a file of Ray's cluster launcher; kubectl apply -f "
            f"{path} starts it, and raylm cluster check --address http://HOST:8265 looks at it"
        )
    provider = values.get("provider") if isinstance(values, dict) else None
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        raise UserError(f"{path}: found no provider.type, allowed: a file of Ray's cluster launcher")
    if provider["type"] == LOCAL:
        _check_local(path, values)
    _check_schema(path, values)
    return ClusterFile(path, values)


def _check_local(path: Path, values: dict[str, Any]) -> None:
    """What Ray's own messages leave unclear about a file that names its machines."""
    provider = values["provider"]
    head, workers = provider.get("head_ip"), provider.get("worker_ips")
    if not isinstance(head, str) or not head:
        raise UserError(f"{path}: provider.head_ip: found {head}, allowed: the head's address")
    if not isinstance(workers, list) or not all(isinstance(one, str) and one for one in workers):
        raise UserError(f"{path}: provider.worker_ips: found {workers}, allowed: a list of addresses, [] for none")
    twice = sorted({one for one in workers if workers.count(one) > 1 or one == head})
    if twice:
        raise UserError(f"{path}: provider.worker_ips: found {twice[0]} twice, allowed: each machine once")
    for key in ("head_node", "worker_nodes", "available_node_types"):
        if values.get(key):
            raise UserError(f"{path}: {key}: found a value, allowed with provider.type local: nothing")
    auth = values.get("auth")
    if not isinstance(auth, dict) or not auth.get("ssh_user"):
        raise UserError(f"{path}: auth.ssh_user: found none, allowed: who logs in to the machines")
    key = auth.get("ssh_private_key")
    if key and not Path(key).expanduser().is_file():
        raise UserError(f"{path}: auth.ssh_private_key: found {key}, which is not there, allowed: a key's file")


def _check_schema(path: Path, values: dict[str, Any]) -> None:
    """Ray's own check, of the file as it is, and as Ray's launcher fills it in."""
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    del schema["required"]
    try:
        jsonschema.validate(values, schema)
        validate_config(prepare_config(dict(values)))
    except jsonschema.ValidationError as error:
        key = ".".join(str(part) for part in error.absolute_path)
        raise UserError(f"{path}: {key or 'the file'}: {first_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path}: Ray's launcher does not take it: {first_line(error)}") from None
    except SystemExit:
        raise UserError(f"{path}: Ray's launcher does not take it; it said why above") from None


def check_mounts(cluster: ClusterFile) -> None:
    """Make the token where the file sends it and there is none; refuse what else is not here.

    Raises:
        UserError: names the file.
    """
    for there, here in (cluster.values.get("file_mounts") or {}).items():
        source = Path(here).expanduser()
        if source.exists():
            continue
        if Path(there).name != Path(TOKEN).name:
            raise UserError(f"{cluster.path}: file_mounts: found {here}, which is not there, allowed: a file or folder")
        source.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))


def check_reached(cluster: ClusterFile) -> None:
    """Log in to each machine that the file names.

    Raises:
        UserError: names those that do not let this machine in, and why.
    """
    broken = cluster.failed_on(lambda address: cluster.run_on(address, "true", 3 * SSH_SECONDS))
    if broken:
        address, reason = next(iter(broken.items()))
        others = f" (nor do {', '.join(list(broken)[1:])})" if len(broken) > 1 else ""
        user = cluster.values["auth"]["ssh_user"]
        raise UserError(f"{cluster.path}: {address} does not let {user} in over ssh: {reason}{others}")
