"""Clusters up and down, over Ray's own launcher; what it leaves undone is done and seen to here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from raylm.cluster.environment import inherited_environment
from raylm.errors import RunFailure
from raylm.launcher.cluster_file import (
    DASHBOARD_PORT,
    ClusterFile,
    Ran,
    check_mounts,
    check_reached,
    last_line,
    read_cluster_file,
)
from raylm.progress import Activity

# Ray's launcher installs packages on the head; then the head does so on the workers.
UP_SECONDS = 3600.0
STOP_SECONDS = 120.0
# `ray stop` does not wait for the dashboard's own processes, which look once a second whether it is gone.
HELPERS_END = (
    'for n in $(seq 50); do pgrep -u $(id -u) -f "[f]orkserver import main.*ray[.]dashboard" >/dev/null || break; '
    "sleep 0.2; done"
)
POLL_SECONDS = 2.0
NODES_SECONDS = 120.0


def up(path: Path, wait_seconds: float) -> None:
    """Start the cluster of the file at ``path`` and wait until all of its nodes are there.

    Args:
        wait_seconds: how long the workers may take after the head is up.

    Raises:
        UserError: the file is wrong, or a machine is not reached; nothing was started.
        RunFailure: Ray's launcher failed, or nodes did not come; names them.
    """
    with Activity("cluster up: reading the file"):
        cluster = read_cluster_file(path)
        check_mounts(cluster)
    if cluster.is_local:
        with Activity(f"cluster up: logging in to {1 + len(cluster.workers)} machines"):
            check_reached(cluster)
    log = log_of(cluster)
    with Activity(f"cluster up: setting up the head and starting Ray on it (log: {log})"):
        _launch(cluster, log, "up", "--yes", "--no-config-cache")
    nodes = _await_nodes(cluster, wait_seconds, log)
    head = next((node["address"] for node in nodes if node["head"]), cluster.head)
    print(f"{cluster.name}: {len(nodes)} node{'s' if len(nodes) != 1 else ''} up, head {head}")
    if not cluster.sends_token:
        print(
            "warning: the file sends no ~/.ray/auth_token: whoever reaches this cluster's ports may run code on it",
            file=sys.stderr,
        )
    print(next_steps(cluster))


def next_steps(cluster: ClusterFile) -> str:
    """What can be done with a cluster that is up."""
    lines = []
    if cluster.is_local:
        address = f"http://{cluster.head}:{DASHBOARD_PORT}"
    else:
        lines.append(f"  reach it   ray dashboard {cluster.path}      (in a terminal of its own)")
        address = f"http://127.0.0.1:{DASHBOARD_PORT}"
    token = "RAY_AUTH_MODE=token " if cluster.sends_token else ""
    lines += [
        f"  then       export {token}RAY_API_SERVER_ADDRESS={address}",
        f"  check      raylm cluster check {cluster.path} --storage /shared",
        "  use        raylm submit pretrain FILE.yaml run.storage=/shared/runs",
        f"  end        raylm cluster down {cluster.path}",
    ]
    return "\n".join(lines)


def down(path: Path) -> None:
    """End the cluster of the file at ``path``, its workers too.

    Raises:
        UserError: the file is wrong.
        RunFailure: Ray still runs on a machine; names it.
    """
    cluster = read_cluster_file(path)
    log = log_of(cluster)
    # The head first: while it runs it starts again what is stopped.
    with Activity(f"cluster down: stopping {cluster.name} (log: {log})"):
        try:
            _launch(cluster, log, "down", "--yes")
        except RunFailure:
            # A head that is lost keeps nobody from stopping the others, and is named below.
            if not cluster.is_local:
                raise
        left = _stop_machines(cluster, log) if cluster.is_local else {}
    if left:
        address, reason = next(iter(left.items()))
        others = f"; nor on {', '.join(list(left)[1:])}" if len(left) > 1 else ""
        raise RunFailure(f"Ray could not be stopped on {address}: {reason}{others}")
    print(f"{cluster.name}: down")


def log_of(cluster: ClusterFile) -> Path:
    """Where what Ray's launcher says goes."""
    return Path.home() / ".ray" / f"raylm-{cluster.name}.log"


def nodes_of(cluster: ClusterFile) -> list[dict[str, Any]]:
    """The live nodes as the head sees them: address, name, whether it is the head, resources.

    Raises:
        RunFailure: the head does not say.
    """
    said = on_head(cluster, "python -m raylm.launcher.nodes", NODES_SECONDS)
    lines = [line for line in said.splitlines() if line.startswith('{"nodes"')]
    if not lines:
        raise RunFailure(f"the head of {cluster.name} does not list its nodes; why is in {log_of(cluster)}")
    return json.loads(lines[-1])["nodes"]


def on_head(cluster: ClusterFile, command: str, seconds: float) -> str:
    """What a command on the head prints; what it says on stderr goes to the log.

    Raises:
        RunFailure: it failed, or did not end in time.
    """
    line = cluster.on_node(command, head=True)
    if cluster.is_local:
        assert cluster.head is not None
        whole = cluster.ssh(cluster.head, line)
    else:
        whole = _ray("exec", str(cluster.path), line)
    try:
        done = subprocess.run(
            whole, capture_output=True, text=True, errors="replace", timeout=seconds, env=_environment(cluster)
        )
    except subprocess.TimeoutExpired:
        raise RunFailure(f"the head of {cluster.name} did not answer within {seconds:.0f} s: {command}") from None
    with log_of(cluster).open("a", encoding="utf-8") as log:
        log.write(done.stderr)
    if done.returncode:
        reason = f": {said}" if (said := last_line(done.stderr)) else ""
        raise RunFailure(f"on the head of {cluster.name} `{command}` ended with status {done.returncode}{reason}")
    return done.stdout


def _await_nodes(cluster: ClusterFile, wait_seconds: float, log: Path) -> list[dict[str, Any]]:
    """The nodes once all are there: Ray's launcher returns when the head is, and says nothing of those that never come.

    Raises:
        RunFailure: names those that are missing.
    """
    wanted, end = cluster.least_nodes, time.monotonic() + wait_seconds
    with Activity(f"cluster up: waiting for {wanted} node{'s' if wanted != 1 else ''}") as activity:
        while True:
            nodes = nodes_of(cluster)
            if len(nodes) >= wanted:
                return nodes
            activity.change(f"cluster up: {len(nodes)} of {wanted} nodes are there")
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS)
    there = {node["address"] for node in nodes}
    missing = [one for one in cluster.machines if one not in there]
    named = f": {', '.join(missing)}" if missing else ""
    raise RunFailure(
        f"{len(nodes)} of {wanted} nodes came within {wait_seconds:.0f} s, missing{named}; why is in {log} and on the "
        f"head in /tmp/ray/session_latest/logs/monitor.out; raylm cluster down {cluster.path} ends what came"
    )


def _launch(cluster: ClusterFile, log: Path, *command: str) -> None:
    """Run Ray's launcher.

    Raises:
        RunFailure: it failed; the last that it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    verb, *options = command
    with log.open("wb") as output:
        try:
            status = subprocess.run(
                _ray(verb, *options, str(cluster.path)), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, timeout=UP_SECONDS, env=_environment(cluster),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunFailure(f"ray {verb} has not ended within {UP_SECONDS:.0f} s (log: {log})") from None
    if status:
        said = last_line(log.read_text(errors="replace"))
        raise RunFailure(f"ray {verb} ended with status {status}: {said} (log: {log})")


def _stop_machines(cluster: ClusterFile, log: Path) -> dict[str, str]:
    """Stop Ray on each machine of the file, which Ray's launcher does on the head alone; what failed where."""

    def stop(address: str) -> Ran:
        # `ray stop` says nothing of what it could not stop.
        stopping = cluster.on_node("ray stop", head=address == cluster.head)
        ran = cluster.run_on(address, f"{stopping}; {HELPERS_END}; ! pgrep -u $(id -u) -x raylet", STOP_SECONDS)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{address}: {ran.output}{ran.errors}")
        return ran

    return cluster.failed_on(stop)


def _ray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _environment(cluster: ClusterFile) -> dict[str, str]:
    # With the second autoscaler a local provider starts one worker too few and says nothing.
    second = {"RAY_UP_enable_autoscaler_v2": "0"} if cluster.is_local else {}
    return {**inherited_environment(), "PYTHONUNBUFFERED": "1", **second}
