"""SIGKILL to random workers and to the driver, again and again over one run, which must end with the same bits.

``python tests/benchmarks/kill_test.py [WORKER_KILLS] [DRIVER_KILLS] [STEPS] [OUTPUT.json]`` (20, 5 and 300 by default)
trains a small model twice, undisturbed and under kills at random steps, and writes each kill with the seconds until
training was back beyond it, and whether all losses and the exported weights are the same. Exit status 1 if not.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from small_run import finish, start, wait_until, write_recipes

from raylm.training.reports.metrics import read_metrics


def workers(driver: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def reached(run: Path) -> int:
    lines = read_metrics(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def disturbed(directory: Path, kinds: list[str], steps: int, generator: random.Random) -> list[dict]:
    run, kills = directory / "killed", []
    metrics = run / "metrics.jsonl"
    driver = start("pretrain", directory, "run.name=killed")
    for kind, step in zip(kinds, sorted(generator.sample(range(3, steps - 3), len(kinds))), strict=True):
        wait_until(lambda at=step: reached(run) >= at, f"step {step}", driver, directory)
        # Any moment will do: in a step, while a checkpoint is written, while another restart is under way.
        time.sleep(generator.uniform(0, 0.2))
        at = reached(run)
        began = time.monotonic()
        if kind == "driver":
            driver.kill()
            driver.wait(60)
            driver = start("pretrain", directory, "run.name=killed")
        else:
            while not (candidates := workers(driver)):
                time.sleep(0.05)
            generator.choice(candidates).kill()
        # The metrics are cut back to the checkpoint when the workers are back.
        changed = metrics.stat().st_ino
        wait_until(lambda old=changed: metrics.stat().st_ino != old, f"a restart after step {at}", driver, directory)
        wait_until(lambda at=at: reached(run) >= at, f"step {at} again", driver, directory)
        kills.append({"kind": kind, "step": at, "seconds": round(time.monotonic() - began, 2)})
        print(json.dumps(kills[-1]), file=sys.stderr, flush=True)
    finish(driver, directory)
    return kills


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    numbers = [int(text) for text in sys.argv[1:4]]
    worker_kills, driver_kills, steps = numbers + [20, 5, 300][len(numbers) :]
    generator = random.Random(0)
    kinds = ["worker"] * worker_kills + ["driver"] * driver_kills
    generator.shuffle(kinds)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_recipes(
            directory, "whole", 128,
            training={
                "steps": steps, "batch_size": 8, "sequence_length": 128, "log_every_steps": 1, "precision": "fp32",
            },
            checkpoint={"every_steps": 5, "every_seconds": None},
            resources={"workers": 2, "max_failures": 1000},
        )  # fmt: skip
        finish(start("prepare", directory), directory)
        finish(start("pretrain", directory), directory)
        kills = disturbed(directory, kinds, steps, generator)
        losses = [
            [line["loss"] for line in read_metrics(directory / name / "metrics.jsonl")] for name in ("whole", "killed")
        ]
        result = {
            "kills": kills,
            "median_seconds_until_back": {
                kind: statistics.median(k["seconds"] for k in kills if k["kind"] == kind) for kind in sorted(set(kinds))
            },
            "steps": steps,
            "final_losses": [found[-1] for found in losses],
            "losses_identical": losses[0] == losses[1] and len(losses[0]) == steps,
            "weights_identical": weights_hash(directory / "whole") == weights_hash(directory / "killed"),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if len(sys.argv) > 4:
        Path(sys.argv[4]).write_text(text)
    sys.exit(not (result["losses_identical"] and result["weights_identical"]))


if __name__ == "__main__":
    main()
