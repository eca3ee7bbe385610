"""Ports that raylm and Ray take by default, and whether this host's name resolves."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Mapping

from raylm.doctor.finding import Finding

# Port -> what takes it, and what else can be done.
PORTS: Mapping[int, tuple[str, str]] = {
    8000: ("raylm serve", "end that process, or raylm serve FILE serving.port=8001"),
    8265: ("Ray's dashboard", "nothing, unless you start a cluster: ray start --head --dashboard-port=PORT"),
    6379: ("a Ray cluster's head", "nothing, unless you start a cluster: ray start --head --port=PORT"),
}
RESOLVE_SECONDS = 5.0


def probe_ports() -> list[Finding]:
    """A line a port: free, or who listens there."""
    return [judge_port(port, port_error(port), holder(port)) for port in PORTS]


def port_error(port: int, host: str = "127.0.0.1") -> str:
    """Why a server cannot listen at ``host:port``; empty where it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "in use"
            return error.strerror or str(error)
        except OverflowError as error:
            return str(error)
    return ""


def holder(port: int) -> str:
    """Name and number of the process that listens at ``port``; empty where that cannot be seen."""
    try:
        import psutil
    except ImportError:
        return ""
    with contextlib.suppress(psutil.Error, OSError, RuntimeError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}"
    return ""


def judge_port(port: int, error: str, who: str) -> Finding:
    """One line on a port of :data:`PORTS`."""
    use, mend = PORTS[port]
    if not error:
        return Finding(f"port {port}", f"free (for {use})")
    found = f"{error}, {'by ' + who if who else 'by a process that this user cannot see'} (for {use})"
    if who.startswith(("gcs_server", "raylet", "ray")):
        return Finding(f"port {port}", found)
    return Finding(f"port {port}", found, "warning", mend)


def probe_hostname() -> list[Finding]:
    """Whether the host's own name has an address; a resolver that does not answer is waited for a few seconds."""
    name, answer = socket.gethostname(), []

    def resolve() -> None:
        try:
            answer.append(socket.gethostbyname(name))
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(RESOLVE_SECONDS)
    return [judge_hostname(name, answer[0] if answer else None)]


def judge_hostname(name: str, answer: str | OSError | None) -> Finding:
    """One line; ``answer`` is an address, the resolver's error, or None where it said nothing in time."""
    if isinstance(answer, str):
        return Finding("host name", f"{name} is {answer}")
    why = "the resolver does not answer" if answer is None else "has no address"
    mend = f"add a line '127.0.1.1 {name}' to /etc/hosts; on several hosts, their own addresses"
    return Finding("host name", f"{name}: {why}", "warning", mend)
