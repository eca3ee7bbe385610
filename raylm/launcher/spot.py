"""Notices that a cloud takes a spot machine back: watched on the machine, passed on to Ray as the drain of its node.

``python -m raylm.launcher.spot aws`` (or ``gcp``) runs beside Ray on each worker. AWS announces the end two minutes
before (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html), Google 30 seconds
(https://cloud.google.com/compute/docs/instances/spot#preemption-process). Ray then gives the node no new work, Ray
Train saves a checkpoint, and Ray Serve moves its replicas. Nothing but the standard library is imported before.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Protocol

from raylm.errors import RunFailure, first_line

# AWS's advice.
POLL_SECONDS = 5.0
# Google answers no sooner than something changes, or after this many seconds.
WAIT_SECONDS = 60
# What Google gives a machine after the notice.
GCP_SECONDS = 30.0
# What AWS gives where it does not say a time.
AWS_SECONDS = 120.0
ANSWER_SECONDS = 5.0
# Without a first answer: the metadata server is there before any user's process.
LOST_SECONDS = 60.0
# Of an AWS session token; the longest allowed is six hours.
TOKEN_SECONDS = 6 * 3600
UNAUTHORIZED, NOT_FOUND = 401, 404


@dataclass(frozen=True)
class Notice:
    """The machine is about to be taken; ``seconds`` is how long it has from now."""

    text: str
    seconds: float


class Cloud(Protocol):
    """A metadata server."""

    def look(self) -> Notice | None:
        """The notice, or None while there is none.

        Raises:
            OSError: the server does not answer.
        """
        ...


class Aws:
    """EC2's instance metadata service, version 2: each question carries a session token.

    ``AWS_EC2_METADATA_SERVICE_ENDPOINT``, the variable of AWS's own tools, names another address.
    """

    def __init__(self) -> None:
        named = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        self.address = (named or "http://169.254.169.254").rstrip("/")
        self._token = ""

    def look(self) -> Notice | None:
        """See :class:`Cloud`."""
        try:
            return self._look()
        except urllib.error.HTTPError as error:
            if error.code == NOT_FOUND:
                return None
            if error.code != UNAUTHORIZED:
                raise
            # The token has run out; the next look takes a new one.
            self._token = ""
            return None

    def _look(self) -> Notice | None:
        if not self._token:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
            self._token = _ask(f"{self.address}/latest/api/token", header, method="PUT")[0]
        header = {"X-aws-ec2-metadata-token": self._token}
        text = _ask(f"{self.address}/latest/meta-data/spot/instance-action", header)[0]
        try:
            found = json.loads(text)
            end = datetime.datetime.fromisoformat(found["time"])
            return Notice(f"AWS will {found['action']} this instance", max(0.0, end.timestamp() - time.time()))
        except (ValueError, KeyError, TypeError):
            # Whatever it says there, it is a notice.
            return Notice(f"AWS announces: {text[:100]}", AWS_SECONDS)


class Gcp:
    """Compute Engine's metadata server, which answers when something has changed.

    ``GCE_METADATA_HOST``, the variable of Google's own clients, names another host.
    """

    def __init__(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        self.address = f"http://{host}"
        self._etag = ""

    def look(self) -> Notice | None:
        """See :class:`Cloud`; the first call answers at once."""
        url = f"{self.address}/computeMetadata/v1/instance/preempted"
        patience = ANSWER_SECONDS
        if self._etag:
            url += f"?wait_for_change=true&timeout_sec={WAIT_SECONDS}&last_etag={self._etag}"
            patience += WAIT_SECONDS
        text, headers = _ask(url, {"Metadata-Flavor": "Google"}, seconds=patience)
        self._etag = headers.get("ETag", "")
        return Notice("Google preempts this instance", GCP_SECONDS) if text.strip() == "TRUE" else None


CLOUDS: dict[str, type[Aws] | type[Gcp]] = {"aws": Aws, "gcp": Gcp}


def _ask(
    url: str, headers: dict[str, str], *, method: str = "GET", seconds: float = ANSWER_SECONDS
) -> tuple[str, http.client.HTTPMessage]:
    request = urllib.request.Request(url, headers=headers, method=method)
    # A proxy would be asked about its own machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=seconds) as response:
        return response.read().decode(), response.headers


def wait_for_notice(cloud: Cloud, *, poll_seconds: float = POLL_SECONDS, lost_seconds: float = LOST_SECONDS) -> Notice:
    """Look until there is a notice, however long that takes.

    Raises:
        RunFailure: the metadata server has never answered within ``lost_seconds``.
    """
    began, answered = time.monotonic(), False
    while True:
        try:
            notice = cloud.look()
            answered = True
            if notice is not None:
                return notice
        except (OSError, http.client.HTTPException) as error:
            # Later it may be gone for a while, as for maintenance.
            if not answered and time.monotonic() - began > lost_seconds:
                raise RunFailure(
                    f"spot: the metadata server has not answered for {lost_seconds:.0f} s: {first_line(error)}; is "
                    "this machine in that cloud?"
                ) from None
        time.sleep(poll_seconds)


def drain(notice: Notice, address: str | None) -> list[str]:
    """Have Ray drain the nodes of this machine; returns their ids in hexadecimal.

    Ray's ``drain-node`` does the same for one node, but needs a driver on it to learn its id.

    Args:
        address: ``HOST:PORT`` of the cluster; by default the one that Ray on this machine has joined.

    Raises:
        RunFailure: there is no such cluster, no node of it on this machine, or it did not take the request.
    """
    import psutil
    from ray._private import services
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2, gcs_pb2
    from ray.exceptions import RayError

    deadline = int((time.time() + notice.seconds) * 1000)
    mine = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    try:
        cluster = services.canonicalize_bootstrap_address_or_die(address)
        host, _, port = cluster.rpartition(":")
        # Where nothing listens Ray's client tries for half a minute.
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        gcs = GcsClient(address=cluster)
        nodes = [
            node.node_id.hex()
            for node in gcs.get_all_node_info(timeout=ANSWER_SECONDS).values()
            if node.state == gcs_pb2.GcsNodeInfo.ALIVE and node.node_manager_address in mine
        ]
        if not nodes:
            raise RunFailure("spot: the cluster has no node on this machine")
        for node in nodes:
            accepted, reason = gcs.drain_node(
                node, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, notice.text, deadline, timeout=ANSWER_SECONDS
            )
            if not accepted:
                raise RunFailure(f"spot: Ray does not drain node {node}: {reason}")
    except (OSError, ValueError, RayError) as error:
        raise RunFailure(f"spot: the Ray of this machine does not answer: {first_line(error)}") from None
    return nodes


def watch(cloud: Cloud, address: str | None) -> int:
    """Wait for a notice and drain; tries again while the machine is there. Returns the exit status."""
    try:
        notice = wait_for_notice(cloud)
    except RunFailure as failure:
        return _failed(failure)
    end = time.monotonic() + notice.seconds
    print(f"spot: {notice.text} in {notice.seconds:.0f} s", flush=True)
    while True:
        left = end - time.monotonic()
        try:
            nodes = drain(Notice(notice.text, max(0.0, left)), address)
        except RunFailure as failure:
            if left <= 0:
                return _failed(failure)
            time.sleep(1.0)
        else:
            print(f"spot: Ray drains {', '.join(nodes)}", flush=True)
            return 0


def _failed(failure: RunFailure) -> int:
    print(f"raylm: failed: {failure}", file=sys.stderr, flush=True)
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Entry point: 0 a notice came and Ray drains, 1 it could not be watched or passed on, 2 wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m raylm.launcher.spot", description=__doc__.partition("\n")[0])
    parser.add_argument("cloud", choices=sorted(CLOUDS), help="whose machine this is")
    parser.add_argument("--address", help="HOST:PORT of the cluster; by default the one that Ray here has joined")
    values = parser.parse_args(arguments)
    return watch(CLOUDS[values.cloud](), values.address)


if __name__ == "__main__":
    sys.exit(main())
