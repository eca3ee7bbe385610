"""What the benchmarks of disturbed runs share: a small model on embedded text, and its commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

PATIENCE_SECONDS = 240.0


def write_recipes(directory: Path, name: str, width: int, **sections: dict[str, Any]) -> None:
    """Write ``prepare.yaml`` and ``pretrain.yaml``, with ``sections`` added to the latter."""
    lines = [f"{i} apples and {i * i} pears make {i + i * i} fruits in all" for i in range(400)]
    (directory / "text.txt").write_text("\n".join(lines))
    prepare = {
        "run": {"name": "data", "storage": str(directory)},
        "data": {"train": str(directory / "text.txt"), "text_unit": "line", "validation_fraction": 0.1},
        "tokenizer": {"type": "byte"},
    }
    pretrain = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(directory / "data")},
        "model": {
            "family": "llama",
            "config": {
                "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        },
        **sections,
    }  # fmt: skip
    for stage, values in (("prepare", prepare), ("pretrain", pretrain)):
        (directory / f"{stage}.yaml").write_text(yaml.safe_dump(values))


def start(stage: str, directory: Path, *overrides: str, ray_address: str | None = None) -> subprocess.Popen:
    """Start a stage; what it prints goes to ``log.txt``."""
    command = [sys.executable, "-m", "raylm.cli", stage, str(directory / f"{stage}.yaml"), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if ray_address is not None:
        environment["RAY_ADDRESS"] = ray_address
    with (directory / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, directory: Path, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for the end of ``process``; exits with its output where it failed."""
    if process.wait(seconds) != 0:
        raise SystemExit(f"exit status {process.returncode}:\n{(directory / 'log.txt').read_text()[-3000:]}")


def wait_until(reached: Callable[[], bool], what: str, process: subprocess.Popen, directory: Path) -> None:
    """Wait for ``reached``; exits with the output of ``process`` where it ended, or it took too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come:\n{(directory / 'log.txt').read_text()[-3000:]}")
        time.sleep(0.02)
