"""`serve deploy` on a running cluster: updates without a failed request, a killed replica, and refused strangers."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylm.config.loading import validate
from raylm.config.stages import ServeConfig

RECIPE = Path(__file__).resolve().parents[2] / "cluster" / "serve.yaml"


def test_the_recipe_is_a_serve_file() -> None:
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load(RECIPE.read_text())
    (application,) = ServeDeploySchema.model_validate(values).applications
    validate(ServeConfig, application.args, "args")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployment:
    """An application on the session's Ray, put there by `serve deploy`."""

    def __init__(self, ray: Any, directory: Path, model: Path) -> None:
        self._file, self._model = directory / "serve.yaml", model
        self._storage, self._port = directory, free_port()
        dashboard = ray._private.worker.get_dashboard_url()
        root = str(RECIPE.parents[1])
        self._environment = {**os.environ, "RAY_DASHBOARD_ADDRESS": f"http://{dashboard}", "PYTHONPATH": root}
        self.url = f"http://127.0.0.1:{self._port}"

    def deploy(self, host: str = "127.0.0.1", **serving: object) -> None:
        values = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": host, "port": self._port},
            "applications": [
                {
                    "name": "deployed",
                    "route_prefix": "/",
                    "import_path": "raylm.serving.deploy.app:build_app",
                    "runtime_env": {"env_vars": {"PYTHONPATH": self._environment["PYTHONPATH"]}},
                    "args": {
                        "run": {"name": "deployed", "storage": str(self._storage)},
                        "model": {"path": str(self._model)},
                        "serving": {"name": "tiny", "cpus_per_replica": 0.5, "drain_seconds": 20.0, **serving},
                    },
                }
            ],
        }
        self._file.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(self._file)]
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=60)

    def wait(self, status: str) -> str:
        """Until the application is as ``status`` says; gives its message."""
        from ray import serve

        # Two replicas start beside the load and the tests of another process: minutes on two slow cores.
        end = time.monotonic() + 360
        while True:
            application = serve.status().applications.get("deployed")
            if application and application.status == status:
                return application.message + "".join(d.message for d in application.deployments.values())
            assert time.monotonic() < end, application
            time.sleep(0.2)

    def ask(self, max_tokens: int = 40) -> str:
        body = json.dumps({"prompt": "the quick brown fox", "max_tokens": max_tokens, "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["choices"][0]["text"]


class Load:
    """Clients that ask one request after the other; ``failures`` is what went wrong.

    They pause as long as they waited, so that half of the machine is left to what starts meanwhile.
    """

    def __init__(self, deployment: Deployment, clients: int) -> None:
        self._deployment, self._stop = deployment, threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(clients)
        self.answers: list[float] = []
        self.failures: list[str] = []
        for _ in range(clients):
            self._pool.submit(self._run)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def more(self, count: int) -> None:
        """Wait for ``count`` more answers."""
        wanted, end = len(self.answers) + count, time.monotonic() + 180
        while len(self.answers) < wanted:
            assert time.monotonic() < end, self.failures
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                self._deployment.ask()
                self.answers.append(time.monotonic())
                self._stop.wait(time.monotonic() - begin)
            except (OSError, ValueError) as error:
                detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                self.failures.append(f"{error!r} {detail}")
                time.sleep(0.05)


@pytest.fixture(scope="module")
def deployment(
    ray_instance: Any, exported_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    from ray import serve

    deployment = Deployment(ray_instance, tmp_path_factory.mktemp("deployed"), exported_model)
    deployment.deploy(replicas=2)
    deployment.wait("RUNNING")
    yield deployment
    serve.shutdown()


def processes(name: str) -> list[int]:
    """Pids of this session's replicas."""
    import ray
    from ray.util.state import list_actors

    address = ray._private.worker.get_dashboard_url()
    alive = list_actors(f"http://{address}", filters=[("state", "=", "ALIVE")], detail=True)
    return [actor.pid for actor in alive if name in actor.name]


@pytest.mark.slow
def test_a_rolling_update_fails_no_request(deployment: Deployment) -> None:
    before = processes("SERVE_REPLICA::deployed#model")
    with Load(deployment, 4) as load:
        load.more(8)
        deployment.deploy(replicas=2, max_new_tokens=50, update_first=True)
        deployment.wait("DEPLOYING")
        deployment.wait("RUNNING")
        load.more(8)
        after = processes("SERVE_REPLICA::deployed#model")
    assert not load.failures
    assert not set(before) & set(after)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        deployment.ask(max_tokens=60)  # the new limit


@pytest.mark.slow
def test_a_killed_replica_is_replaced(deployment: Deployment) -> None:
    first, *_ = before = processes("SERVE_REPLICA::deployed#model")
    clients = 4
    with Load(deployment, clients) as load:
        load.more(8)
        os.kill(first, signal.SIGKILL)
        load.more(20)
        end = time.monotonic() + 240
        while len(set(now := processes("SERVE_REPLICA::deployed#model")) - set(before)) < 1 or len(now) < 2:
            assert time.monotonic() < end, now
            time.sleep(0.2)
        load.more(8)
    # Nothing but what the killed one had in work.
    assert len(load.failures) <= clients, load.failures


@pytest.mark.slow
def test_strangers_are_refused_here_too(deployment: Deployment) -> None:
    from ray import serve

    serve.shutdown()
    deployment.deploy(host="0.0.0.0")
    assert "no API keys" in deployment.wait("DEPLOY_FAILED")
