"""The Ray that raylm starts here: this user's token lets in, nothing else does, and it listens on no other address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Each of these runs in a process of its own: that of the tests may hold a Ray.
VARIABLES = """
import json, os, stat
from raylm.cluster.local_access import local_access
def seen():
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
before = seen()
with local_access():
    inside = seen()
    path = inside.get("RAY_AUTH_TOKEN_PATH", "")
    mode = oct(stat.S_IMODE(os.stat(path).st_mode)) if os.path.exists(path) else None
    token = open(path).read() if mode else None
print(json.dumps({"inside": inside, "mode": mode, "token": token, "left": seen() == before,
                  "gone": not os.path.exists(path)}))
"""
# Ray is imported first, as by `raylm serve`, which looks at the application before it starts Ray.
SESSIONS = """
import json, os, subprocess, sys
import psutil, ray
from raylm.cluster.session import ray_session

client = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(ray.get(ray.remote(lambda: 42).remote()))"

def ask(address, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")} | variables
    result = subprocess.run([sys.executable, "-c", client, address], env=environment, capture_output=True, text=True,
                            timeout=120)
    return result.stdout.strip() or result.stderr.strip().splitlines()[-1]

said = []
for turn in range(2):
    with ray_session(dashboard=turn == 0):
        address = ray.get_runtime_context().gcs_address
        secret = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        addresses, keys, commands = set(), 0, ""
        ray.get(ray.remote(lambda: 1).remote())
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            ports = [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
            addresses.update(ports)
            commands += " ".join(process.cmdline()) if process.pid != os.getpid() else ""
            keys += "RAYLM_API_KEYS" in process.environ() and process.pid != os.getpid()
        found = {"address": address, "listen": sorted(addresses), "keys": keys, "with": ask(address, **secret)}
        found["helpers"] = [name for name in ("log_monitor.py", "dashboard/dashboard.py") if name in commands]
        if turn == 0:
            found["without"] = ask(address)
            found["disabled"] = ask(address, RAY_AUTH_MODE="disabled")
            found["wrong"] = ask(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64)
        said.append(found)
print(json.dumps(said))
"""


def run(code: str, timeout: float, **variables: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, timeout=timeout,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_private_token_for_as_long_as_it_is_needed() -> None:
    said = run(VARIABLES, 60)
    assert said["inside"]["RAY_AUTH_MODE"] == "token"
    assert said["inside"]["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert said["mode"] == "0o600"
    assert len(said["token"]) == 64
    assert said["left"]
    assert said["gone"]
    assert run(VARIABLES, 60)["token"] != said["token"]


@pytest.mark.parametrize(
    "chosen",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"},
        {"RAY_AUTH_TOKEN": "a-token-of-the-user-0001"},
    ],
)
def test_what_the_user_chose_stays(chosen: dict[str, str]) -> None:
    inside = run(VARIABLES, 60, **chosen)["inside"]
    expected = {"RAY_AUTH_MODE": "token"} | chosen
    assert {name: value for name, value in inside.items() if name.startswith("RAY_AUTH")} == expected


@pytest.mark.slow
def test_only_the_token_lets_in() -> None:
    """Ray is started twice in a process: the second one has a token of its own, and no dashboard."""
    first, second = run(SESSIONS, 500, RAYLM_API_KEYS="a-key-of-nobody-0001")
    for said in (first, second):
        assert said["with"] == "42"
        assert said["address"].startswith("127.0.0.1:")
        assert said["listen"]
        assert all(address in ("::1", "::ffff:127.0.0.1", "127.0.0.1") for address in said["listen"])
        assert said["keys"] == 0
    for refused in ("without", "disabled", "wrong"):
        assert first[refused].startswith("ConnectionError: Failed to connect to Ray cluster at 127.0.0.1:")
    # Of Ray's processes only those are started that something asks.
    assert (first["helpers"], second["helpers"]) == (["dashboard/dashboard.py"], [])
