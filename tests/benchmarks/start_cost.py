"""What starting a run costs: CPU and wall seconds of a whole ``raylm pretrain`` that makes three steps.

``python tests/benchmarks/start_cost.py [ROUNDS] [OUTPUT.json] [CHECKOUT ...]`` (1 round by default) trains a tiny model
with two workers. Given checkouts of raylm, such as one before a change and one after it, take turns within each round;
else it is this one. The CPU-seconds are those of all processes of the command, Ray's own included, by what they are:
the load of others does not count as it would in wall time.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from small_run import finish, start, write_recipes

HERE = Path(__file__).parents[2]
SAMPLE_SECONDS = 0.1
MARK = "RAYLM_START_COST"


class Processes:
    """The CPU-seconds of all processes that inherited a mark in their environment, even where a parent has ended."""

    def __init__(self, mark: str) -> None:
        self._mark, self._foreign, self._found = mark, set[psutil.Process](), dict[psutil.Process, tuple[str, float]]()

    def sample(self) -> None:
        """Note what each has used so far; a process that ends before the next sample loses what it uses until then."""
        for process in psutil.process_iter():
            if process in self._foreign:
                continue
            try:
                if process not in self._found and process.environ().get(MARK) != self._mark:
                    # A fork has its parent's environment until it becomes something else.
                    self._foreign.add(process)
                    continue
                times = process.cpu_times()
                # Ray's workers change their name when they get work, and at the end it is empty.
                name = role(process.cmdline()) or self._found.get(process, ("?", 0.0))[0]
                self._found[process] = (name, times.user + times.system)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def seconds(self) -> dict[str, float]:
        """By what the processes are, the greatest first."""
        found: defaultdict[str, float] = defaultdict(float)
        for name, seconds in self._found.values():
            found[name] += seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def role(command: list[str]) -> str:
    """What a process is, in a word."""
    text = " ".join(command)
    if match := re.match(r"ray::([\w:]+)", text):
        name = match[1].split(".")[0]
        return "ray::worker" if "RayTrainWorker" in text else f"ray::{name}"
    for name in ("raylm.cli", "gcs_server", "raylet/raylet", "log_monitor", "dashboard", "runtime_env", "agent/main"):
        if name in text:
            return name
    if "default_worker.py" in text or "setup_worker.py" in text:
        return "a worker of Ray not yet named"
    return Path(command[0]).name if command and command[0] else ""


def measure(checkout: Path, directory: Path, number: int) -> dict[str, Any]:
    mark = uuid.uuid4().hex
    os.environ |= {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    began, processes = time.monotonic(), Processes(mark)
    command = start("pretrain", directory, f"run.name=run{number}")
    os.environ[MARK] = ""
    while command.poll() is None:
        processes.sample()
        time.sleep(SAMPLE_SECONDS)
    # The rest ends with the driver, or at once after it.
    processes.sample()
    finish(command, directory)
    by_process = processes.seconds()
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": sum(by_process.values()),
        "by_process": {name: round(seconds, 2) for name, seconds in by_process.items()},
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    checkouts = [Path(given).resolve() for given in sys.argv[3:]] or [HERE]
    output = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None
    result: dict[str, Any] = {str(checkout): [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        directory, number = Path(folder), 0
        # python -m looks into the current directory first: a checkout there would stand for all of them.
        os.chdir(directory)
        for checkout in checkouts:
            subprocess.run([sys.executable, "-m", "compileall", "-q", str(checkout / "raylm")], check=True)
        training = {"steps": 3, "batch_size": 4, "sequence_length": 32, "evaluation_batches": 1, "precision": "fp32"}
        write_recipes(directory, "run", 16, training=training, resources={"workers": 2})
        finish(start("prepare", directory), directory)
        for _ in range(rounds):
            for checkout in checkouts:
                number += 1
                found = measure(checkout, directory, number)
                print(json.dumps(found), file=sys.stderr, flush=True)
                result[str(checkout)].append(found)
    for runs in list(result.values()):
        medians = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
        runs.append({"median": medians})
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    main()
