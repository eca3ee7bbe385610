"""``raylm cluster check``: the preflight of a cluster, asked over ssh or by a job, and what it means."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from raylm.doctor.finding import Finding
from raylm.errors import RunFailure, UserError, first_line
from raylm.launcher.cluster_file import SSH_SECONDS, ClusterFile, last_line, read_cluster_file
from raylm.launcher.clusters import on_head
from raylm.launcher.connection import connect
from raylm.launcher.control import table
from raylm.launcher.package import code
from raylm.launcher.preflight.figures import figures
from raylm.launcher.preflight.judge import NodeFinding, all_reduce_line, judge, rows, workers_line
from raylm.launcher.preflight.probe import PACKAGES
from raylm.progress import Activity

DRIVER = "raylm.launcher.preflight.driver"
# Ray starts a process on each node; a broken one is waited for.
CHECK_SECONDS = 600.0
POLL_SECONDS = 1.0


def check(
    path: Path | None, address: str | None, storage: str | None, workers: int, threads: int, *, as_json: bool
) -> int:
    """Look at all nodes and print what was found; 1 where something is broken, else 0.

    Args:
        workers: of each node, that are timed at once; 0 times none.
        threads: of each of them.

    Raises:
        UserError: the file or the address is wrong.
        RunFailure: the cluster did not answer.
    """
    if path is not None and address is not None:
        raise UserError(f"--address: found {address}, allowed beside {path}: nothing; the file says where its head is")
    if storage is not None and not Path(storage).is_absolute():
        raise UserError(f"--storage: found {storage}, allowed: the absolute path of a folder on the nodes")
    cluster = read_cluster_file(path) if path is not None else None
    options = {"--storage": storage, "--workers": workers or None, "--threads": threads if workers else None}
    given = [word for name, value in options.items() if value for word in (name, str(value))]
    command = shlex.join(["python", "-m", DRIVER, *given])
    with Activity("cluster check: looking at the nodes, which takes half a minute"):
        said = on_head(cluster, command, CHECK_SECONDS) if cluster else _by_job(address, command)
        record = _read(said)
        if cluster is not None and cluster.is_local:
            _look_at_silent(cluster, record)
    findings = judge(record, cluster.machines if cluster else [], _versions())
    broken = any(one.finding.state == "broken" for one in findings)
    if as_json:
        lines = [{"node": one.node, **vars(one.finding)} for one in findings]
        print(json.dumps({"broken": broken, "findings": lines, "figures": figures(record), **record}, indent=1))
    else:
        _print(record, findings)
    return 1 if broken else 0


def _by_job(address: str | None, command: str) -> str:
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="raylm-check-") as directory:
        code(Path(directory))
        try:
            job_id = client.submit_job(entrypoint=command, runtime_env={"working_dir": directory})
        except (RuntimeError, OSError, ValueError) as error:
            raise RunFailure(f"the cluster did not take the job: {first_line(error)}") from None
    end = time.monotonic() + CHECK_SECONDS
    while str(client.get_job_status(job_id).value) in ("PENDING", "RUNNING"):
        if time.monotonic() > end:
            client.stop_job(job_id)
            raise RunFailure(f"the cluster's nodes were not looked at within {CHECK_SECONDS:.0f} s (job {job_id})")
        time.sleep(POLL_SECONDS)
    return client.get_job_logs(job_id)


def _read(said: str) -> dict[str, Any]:
    """The record in what the driver printed.

    Raises:
        RunFailure: there is none; the last line instead.
    """
    for line in reversed(said.splitlines()):
        if line.startswith('{"preflight"'):
            return json.loads(line)["preflight"]
    raise RunFailure(f"the cluster's nodes were not looked at: {last_line(said) or 'nothing was said'}")


def _look_at_silent(cluster: ClusterFile, record: dict[str, Any]) -> None:
    """Note the disk of nodes that do not answer: Ray's processes die where they cannot write."""
    there = {node["address"]: node for node in record["nodes"]}
    for address in cluster.machines:
        node = there.get(address, {})
        if "error" not in node:
            continue
        ran = cluster.run_on(address, "df -P -B1 ${RAY_TMPDIR:-/tmp} | tail -n 1", 3 * SSH_SECONDS)
        words = ran.output.split()
        if not ran.reason and len(words) >= 4 and words[1].isdigit() and words[3].isdigit():
            node["disk"] = {"total": int(words[1]), "free": int(words[3])}


def _versions() -> dict[str, str]:
    import platform

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _print(record: dict[str, Any], findings: list[NodeFinding]) -> None:
    print(table(rows(record)))
    for line in filter(None, (all_reduce_line(record), workers_line(record))):
        print(line)
    print()
    same: dict[Finding, list[str]] = {}
    for one in findings:
        same.setdefault(one.finding, []).append(one.node)
    for finding, nodes in same.items():
        print(f"{finding.state:<7}  {finding.what}: {finding.found} ({', '.join(nodes)})\n         -> {finding.remedy}")
    broken = len({one.node for one in findings if one.finding.state == "broken"})
    count = len(record["nodes"])
    looked = f"{count} node{'s' if count != 1 else ''} looked at"
    print(f"{looked}, broken: {broken}" if broken else f"{looked}, nothing is broken")
