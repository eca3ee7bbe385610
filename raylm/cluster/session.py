"""Joining the Ray cluster that a stage runs on, or starting one on this machine.

A stage joins the cluster in ``RAY_ADDRESS`` (set by ``ray job submit`` too), else it starts Ray locally and stops it
at the end. Ray is imported only inside the functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from raylm.cluster.environment import default_environment, without_api_keys
from raylm.cluster.local_access import local_access, reread_environment
from raylm.cluster.local_processes import only_what_is_used
from raylm.errors import RunFailure, UserError, first_line
from raylm.progress import Activity

# Ray itself tries for two minutes to reach a cluster that is not there.
CONNECT_SECONDS = 10.0
# Starts of a local Ray: it gives its own processes 30 seconds each, which a busy machine may need for other things.
ATTEMPTS = 3
# Ray's logs alone take some of it.
LEAST_FREE_BYTES = 200 * 10**6


@contextlib.contextmanager
def ray_session(*, dashboard: bool = False) -> Iterator[None]:
    """Hold a connection to Ray; a local instance ends with the block, a joined cluster stays.

    A local instance is for this user alone (:mod:`raylm.cluster.local_access`). A joined one takes the token that Ray's
    own variables name.

    Args:
        dashboard: start the dashboard of a local instance. Ray Tune needs it: without it trials that are killed leak
            their placement groups.

    Raises:
        UserError: ``RAY_ADDRESS`` names a cluster that does not answer, or a local Ray has no room for its files.
        RunFailure: Ray could not be started.
    """
    if joined():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        check_space(ray_files())
    with contextlib.nullcontext() if address else local_access():
        with Activity("joining the Ray cluster" if address else "starting Ray"), _own_termination():
            _start_ray(dashboard)
        try:
            yield
        finally:
            import ray

            ray.shutdown()


def on_a_cluster() -> bool:
    """Whether this process is a driver on a Ray that others started; it is connected."""
    import ray

    worker = ray._private.worker
    own = worker._global_node is not None and worker._global_node.head
    return not own and worker.global_worker.mode == ray.SCRIPT_MODE


def shown_on_dashboard() -> dict[str, str]:
    """Environment in which Ray Train shows its runs on the dashboard, where that is a cluster's; else empty.

    Ray asks for the variable, as an actor more has to start
    (https://docs.ray.io/en/latest/train/user-guides/monitor-your-application.html); a local run does without.
    """
    import ray

    shown = on_a_cluster() and ray._private.worker.get_dashboard_url()
    return {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"} if shown else {}


def ray_files() -> Path:
    """Where a local Ray writes its files and objects: RAY_TMPDIR, on Linux else TMPDIR, else /tmp."""
    place = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None)
    return Path(place or ("/tmp" if os.name == "posix" else tempfile.gettempdir())) / "ray"


def check_space(place: Path, least: int = LEAST_FREE_BYTES) -> None:
    """Refuse a folder that Ray cannot write to: it would try again without an end.

    Raises:
        UserError: the disk is full, or the folder is not writable; names the variable that chooses another.
    """
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    mend = "export RAY_TMPDIR=DIRECTORY"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"TMPDIR: Ray's files go to {place}, which is not writable; {mend} that is")
    if (free := shutil.disk_usage(existing).free) < least:
        raise UserError(
            f"TMPDIR: Ray's files go to {place}, found {free / 1e6:.0f} MB free, allowed: {least / 1e6:.0f} MB or "
            f"more; free some space, or {mend} on another disk"
        )


def joined() -> bool:
    """Whether this process is connected to Ray; without importing Ray where it cannot be."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@contextlib.contextmanager
def _own_termination() -> Iterator[None]:
    """Keep the handler of SIGTERM that is set: Ray's own ends the process amid its C++ threads, which abort it."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    terminated = False
    try:
        yield
    except SystemExit:
        # Ray's answer, given while it starts.
        terminated = True
    finally:
        signal.signal(signal.SIGTERM, before)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


def _start_ray(dashboard: bool) -> None:
    import ray

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
        # An earlier session of this process may have been a local one.
        reread_environment()
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Nobody drains the only node: the actor that would look for it need not be.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        options |= {"include_dashboard": dashboard, "address": "local"}
    # Ray tries 20 times, a minute each, to join a cluster that does not answer this client.
    patience = {"RAY_gcs_server_port_wait_time_s": "1"} if address else {}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            spared = contextlib.nullcontext() if address else only_what_is_used(dashboard=dashboard)
            with without_api_keys(), default_environment(patience), spared:
                ray.init(**options)
            return
        except Exception as error:  # Ray raises its bare class where a process of it does not come up in time
            ray.shutdown()
            if address or isinstance(error, ConnectionError):
                raise UserError(f"{_no_cluster(address or 'local')}: {first_line(error)}{_token_hint()}") from error
            reason = f"Ray did not start: {first_line(error)}"
            if attempt == ATTEMPTS:
                raise RunFailure(reason) from error
            print(f"{reason} (the machine is busy?); trying again", file=sys.stderr, flush=True)


def _token_hint() -> str:
    """What a cluster that is there but does not answer may want."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return "; is the token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH that of the cluster?"
    return "; a cluster that wants a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


def _check_address(address: str) -> None:
    """Refuse the ``HOST:PORT`` of a cluster, with or without ``ray://``, where nothing listens."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{_no_cluster(address)}: {error}") from None


def _no_cluster(address: str) -> str:
    return f"RAY_ADDRESS: found {address}, allowed: the address of a running cluster, or nothing to start Ray here"
