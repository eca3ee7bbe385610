"""A process beside a replica that answers what comes down its pipe: what would hold up the replica, or may die."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import raylm
from raylm.cluster.environment import inherited_environment, worker_environment

CLOSE_SECONDS = 5.0


class HelperProcess:
    """One such process, started at once. It ends when its pipe does, so never later than the replica.

    Args:
        module: run as ``python -m MODULE DESCRIPTOR``, with the descriptor of the pipe's other end.

    Attributes:
        connection: our end of the pipe.
        pid: of the process.
    """

    def __init__(self, module: str) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=inherited_environment() | worker_environment(1) | {"PYTHONPATH": module_path()},
            )
        self.pid = self._process.pid

    def end(self, *, kill: bool = False) -> None:
        """Close the pipe and wait; ``kill`` does not wait for what the process is doing."""
        self.connection.close()
        if kill:
            self._process.kill()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def module_path() -> str:
    """Where a new interpreter finds raylm: Ray may have put a job's directory on this one's path alone."""
    root = str(Path(raylm.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
