"""Whether Ray starts here, or the cluster of ``RAY_ADDRESS`` answers, and how long that takes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time

from raylm.cluster.environment import inherited_environment
from raylm.cluster.local_access import local_access
from raylm.doctor.finding import Finding

START_SECONDS = 26.0
SLOW_SECONDS = 15.0
CONNECT_SECONDS = 5.0

# Ends itself and, with it, what Ray started. What Ray prints goes to stderr.
_CHILD = """
import json, os, sys, time
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
began = time.monotonic()
import ray
imported = time.monotonic()
address = os.environ.get("RAY_ADDRESS")
if not address:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
options = {} if address else {"address": "local", "include_dashboard": False}
try:
    ray.init(log_to_driver=False, logging_level="ERROR", **options)
    started = time.monotonic()
    total = ray.cluster_resources()
    said = {"seconds": started - imported, "nodes": sum(node["Alive"] for node in ray.nodes()),
            "cpus": total.get("CPU", 0), "gpus": total.get("GPU", 0)}
except BaseException as error:
    said = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(said), file=out, flush=True)
ray.shutdown()
"""


def probe_ray(time_limit: float = START_SECONDS) -> list[Finding]:
    """One line; ``time_limit`` in seconds for the import and the start together."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address and (refusal := connection_error(address)):
        return [judge_ray(address, {"error": refusal}, 0.0, time_limit)]
    began = time.monotonic()
    with contextlib.nullcontext() if address else local_access():
        said = _probe(time_limit)
    return [judge_ray(address, said, time.monotonic() - began, time_limit)]


def _probe(time_limit: float) -> dict | None:
    """What the probing process printed; None where it did not end within ``time_limit`` seconds."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", env=inherited_environment(),
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        # Its raylet and the rest of Ray end when they lose it.
        process.kill()
        process.wait()
        return None
    try:
        return json.loads(output.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = errors.strip().splitlines()[-1:] or [f"the process ended with status {process.returncode}"]
        return {"error": last[0]}


def connection_error(address: str) -> str:
    """Why nothing can be reached at ``HOST:PORT`` or ``ray://HOST:PORT``; empty where it can, or for other forms."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if match is None:
        return ""
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""


def judge_ray(address: str, said: dict | None, seconds: float, time_limit: float) -> Finding:
    """One line.

    Args:
        address: ``RAY_ADDRESS``, empty for a local start.
        said: what the probing process printed; None where it did not end within ``time_limit`` seconds.
        seconds: that it took in all.
    """
    unset = "start that cluster, or unset RAY_ADDRESS to start Ray on this machine"
    if said is None:
        if address:
            found = f"the cluster at {address} did not answer within {time_limit:.0f} s"
            return Finding("ray cluster", found, "broken", unset)
        found = f"did not start within {time_limit:.0f} s"
        return Finding("ray start", found, "warning", "the machine is busy or slow; try again when it is idle")
    if "error" in said:
        error = " ".join(str(said["error"]).split())[:200]
        if address:
            return Finding("ray cluster", f"RAY_ADDRESS={address}: {error}", "broken", unset)
        missing = error.startswith("ModuleNotFoundError")
        logs = "see its logs in /tmp/ray/session_latest/logs"
        return Finding("ray start", error, "broken", "python -m pip install 'ray[default,data,train,tune,serve]'"
                       if missing else logs)  # fmt: skip
    gpus = f", {said['gpus']:g} GPUs" if said["gpus"] else ""
    if address:
        return Finding("ray cluster", f"{address} answers: {said['nodes']} nodes, {said['cpus']:g} CPUs{gpus}")
    found = f"starts in {said['seconds']:.1f} s with {said['cpus']:g} CPUs{gpus}"
    if said["seconds"] > SLOW_SECONDS:
        return Finding("ray start", found, "warning", "slow: the machine is busy, or its disk is")
    return Finding("ray start", found)
