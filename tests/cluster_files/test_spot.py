"""Spot notices: read from servers that answer as the vendors' do, and passed on to a real Ray."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raylm.errors import RunFailure
from raylm.launcher.spot import GCP_SECONDS, Aws, Gcp, main, wait_for_notice

# Why the nodes of the cluster at an address have ended, once all have.
DEATHS = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import common_pb2, gcs_pb2

client = GcsClient(address=sys.argv[1])
for _ in range(200):
    nodes = client.get_all_node_info(timeout=5).values()
    if all(node.state == gcs_pb2.GcsNodeInfo.DEAD for node in nodes):
        print(*(common_pb2.NodeDeathInfo.Reason.Name(node.death_info.reason) for node in nodes))
        break
    time.sleep(0.2)
"""
Answer = tuple[int, str, dict[str, str]]


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], Answer]) -> Iterator[str]:
    """An HTTP server on the loopback address; gives ``HOST:PORT``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text, headers = answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FakeImds:
    """EC2's metadata service, version 2: a token for each question, 404 until there is a notice."""

    def __init__(self) -> None:
        self.notice: str | None = None
        self.tokens: list[str] = []

    def __call__(self, request: BaseHTTPRequestHandler) -> Answer:
        if request.path == "/latest/api/token":
            lifetime = request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if request.command != "PUT" or not lifetime.isdigit() or not 1 <= int(lifetime) <= 21600:
                return 400, "", {}
            self.tokens.append(secrets.token_hex(8))
            return 200, self.tokens[-1], {}
        if request.headers.get("X-aws-ec2-metadata-token") not in self.tokens[-1:]:
            return 401, "", {}
        if request.path != "/latest/meta-data/spot/instance-action" or self.notice is None:
            return 404, "", {}
        return 200, self.notice, {}

    def take(self, seconds: float) -> None:
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        self.notice = json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"})


class FakeGce:
    """Compute Engine's metadata server: a header is asked for, and a wait ends with the change."""

    def __init__(self) -> None:
        self.preempted = threading.Event()
        self.waits = 0

    def __call__(self, request: BaseHTTPRequestHandler) -> Answer:
        path, _, query = request.path.partition("?")
        if request.headers.get("Metadata-Flavor") != "Google":
            return 403, "", {}
        if path != "/computeMetadata/v1/instance/preempted":
            return 404, "", {}
        values = dict(part.split("=") for part in query.split("&") if part)
        if values.get("wait_for_change") == "true" and values.get("last_etag") == self.etag():
            self.waits += 1
            self.preempted.wait(min(1.0, float(values["timeout_sec"])))
        return 200, "TRUE" if self.preempted.is_set() else "FALSE", {"ETag": self.etag()}

    def etag(self) -> str:
        return "b" if self.preempted.is_set() else "a"


@pytest.fixture
def imds(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeImds]:
    server = FakeImds()
    with serving(server) as address:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}/")
        yield server


def test_a_notice_of_aws(imds: FakeImds) -> None:
    cloud = Aws()
    assert cloud.look() is None
    imds.take(120)
    notice = cloud.look()
    assert notice is not None
    assert 110 < notice.seconds <= 120
    assert notice.text == "AWS will terminate this instance"
    assert len(imds.tokens) == 1


def test_a_token_that_has_run_out_is_renewed(imds: FakeImds) -> None:
    cloud = Aws()
    assert cloud.look() is None
    imds.tokens.append("another session's")
    assert cloud.look() is None
    imds.take(120)
    assert cloud.look() is not None
    assert len(imds.tokens) == 3


def test_a_notice_that_is_no_json_is_still_one(imds: FakeImds) -> None:
    imds.notice = "<html>"
    notice = Aws().look()
    assert notice is not None and notice.seconds == 120


def test_a_notice_of_google(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeGce()
    with serving(server) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        cloud = Gcp()
        assert cloud.look() is None
        assert cloud.look() is None
        assert server.waits == 1
        threading.Timer(0.2, server.preempted.set).start()
        notice = wait_for_notice(cloud, poll_seconds=0.05)
    assert notice.seconds == GCP_SECONDS


def test_another_machine_than_one_of_the_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(RunFailure, match="has not answered"):
            wait_for_notice(Gcp(), poll_seconds=0.01, lost_seconds=0.05)


def test_a_server_that_goes_for_a_while_is_asked_again(imds: FakeImds) -> None:
    class Shaky(Aws):
        looks = 0

        def look(self):
            self.looks += 1
            if self.looks == 2:
                raise ConnectionRefusedError
            if self.looks == 3:
                imds.take(60)
            return super().look()

    assert wait_for_notice(Shaky(), poll_seconds=0.01, lost_seconds=0.0).seconds > 50


def test_an_unknown_cloud_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["moon"])
    assert ending.value.code == 2
    assert "aws" in capsys.readouterr().err


def test_a_notice_without_ray_fails(imds: FakeImds, capsys: pytest.CaptureFixture[str]) -> None:
    imds.take(0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert main(["aws", "--address", f"127.0.0.1:{probe.getsockname()[1]}"]) == 1
    assert capsys.readouterr().err.startswith("raylm: failed: spot: the Ray of this machine does not answer")


@pytest.mark.slow
def test_a_notice_drains_the_node(imds: FakeImds, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An idle node that is drained ends by itself; the token is asked for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(16))
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--num-cpus=1", "--include-dashboard=false", "--object-store-memory=80000000",
        "--dashboard-agent-listen-port=0", f"--temp-dir={tmp_path_factory.getbasetemp().parent / f'r{port}'}",
    ]  # fmt: skip
    watcher = [sys.executable, "-m", "raylm.launcher.spot", "aws", "--address", f"127.0.0.1:{port}"]
    with (tmp_path / "ray.log").open("w") as log:
        node = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        )
    try:
        until(lambda: "Ray runtime started" in (tmp_path / "ray.log").read_text(), 60)
        imds.take(60)
        found = subprocess.run(watcher, capture_output=True, text=True, env=environment, timeout=60)
        assert found.returncode == 0, found.stderr
        assert "spot: AWS will terminate this instance in" in found.stdout
        assert "spot: Ray drains " in found.stdout
        script = [sys.executable, "-c", DEATHS, f"127.0.0.1:{port}"]
        deaths = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=60)
        assert deaths.stdout.split() == ["AUTOSCALER_DRAIN_PREEMPTED"], deaths.stderr
    finally:
        node.terminate()
        node.wait(30)


def until(done: Callable[[], bool], seconds: float) -> None:
    """Wait until it is done."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)
