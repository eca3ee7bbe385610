"""Commands in processes of their own, to be interrupted as a terminal does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Python with ``arguments``, without a cluster to join, in a process group of its own.

    It answers SIGINT also where whatever runs the tests ignores it, as a shell has its background jobs do.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**inherited, "PYTHONPATH": str(ROOT), **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
