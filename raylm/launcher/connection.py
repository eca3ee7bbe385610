"""The jobs of a Ray cluster, through its dashboard.

Relies on Ray's job submission SDK (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/sdk.html).
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from raylm.errors import UserError, first_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Where Ray's dashboard listens.
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PORT = 8265
CONNECT_SECONDS = 10.0


def connect(address: str | None) -> JobSubmissionClient:
    """The jobs of a cluster.

    Args:
        address: ``http://HOST:8265`` of the cluster's dashboard; by default what RAY_API_SERVER_ADDRESS says, or else
            this machine.

    Raises:
        UserError: nothing answers there, it wants a token, or it runs another version of Ray.
    """
    key, address = _address(address)
    _check_listening(key, address)
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # The client tells of each package and connection.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    found = f"{key}: found {address}"
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"{found}, which refuses this client's token, allowed: RAY_AUTH_MODE=token and the cluster's token in "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
        raise UserError(f"{found}, allowed: the address of a Ray dashboard: {first_line(error)}") from None
    # Ray has no public way to ask; get_version() is that of the interface.
    version = getattr(client, "_server_ray_version", None) or ray.__version__
    if version != ray.__version__:
        raise UserError(
            f"{found}, whose Ray is {version}, allowed: that of this machine, {ray.__version__}; install the same "
            "locked set on both"
        )
    return client


def _address(given: str | None) -> tuple[str, str]:
    """What names the address, and the address as a URL."""
    key, text = "--address", given
    if text is None:
        key, text = "RAY_API_SERVER_ADDRESS", os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    return key, text if "://" in text else f"http://{text}"


def _check_listening(key: str, address: str) -> None:
    """Refuse an address where nothing listens: the client would wait for minutes."""
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise UserError(f"{key}: found {address}, allowed: http://HOST:8265, the address of a cluster's dashboard")
    try:
        socket.create_connection((parts.hostname, port or DEFAULT_PORT), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{key}: found {address}, allowed: the address of a running cluster's dashboard, http://HOST:8265: {error}"
        ) from None
