"""What fault tolerance costs: the stall by checkpoints, the memory of saving, and Ray Train over the bare engine.

``python tests/benchmarks/training_cost.py [ROUNDS] [OUTPUT.json]`` (1 by default) trains a Llama of about 25 million
parameters with two workers: with a checkpoint every 20 s, without any, and the same engine under torchrun, in turn. The
CPU-seconds are those of all processes of a command, Ray's own included, between the same two steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from raylm.training.reports.metrics import read_metrics

HERE = Path(__file__).parent
STEPS, FIRST, LAST, EVERY = 70, 10, 70, 10
WIDTH, LAYERS, VOCABULARY = 384, 9, 4096
PATIENCE_SECONDS = 280.0


def recipe(directory: Path, name: str, checkpoint_seconds: float | None) -> Path:
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(directory / "data")},
        "model": {
            "family": "llama",
            "config": {
                "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
                "num_attention_heads": 8, "num_key_value_heads": 8,
            },
        },
        "training": {
            "steps": STEPS, "batch_size": 4, "sequence_length": 128, "log_every_steps": EVERY, "evaluation_batches": 1,
            "precision": "fp32",
        },
        "parallel": {"zero_stage": 1, "micro_batch_size": 2},
        "checkpoint": {"every_seconds": checkpoint_seconds},
        "resources": {"workers": 2},
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def prepare(directory: Path) -> None:
    words = [f"w{i * 7919 % 100003}" for i in range(3500)]
    lines = [" ".join(words[(i * 31 + j * j) % len(words)] for j in range(120)) for i in range(2500)]
    (directory / "text.txt").write_text("\n".join(lines))
    values = {
        "run": {"name": "data", "storage": str(directory)},
        "data": {"train": str(directory / "text.txt"), "text_unit": "line"},
        "tokenizer": {"type": "bpe", "vocab_size": VOCABULARY},
    }
    (directory / "data.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "raylm.cli", "prepare", str(directory / "data.yaml")]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, stdout=sys.stderr)


def processor_seconds(root: psutil.Process) -> dict[int, float]:
    """CPU-seconds of ``root`` and its descendants, by process id."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def measure(command: list[str], progress: Path) -> dict[str, float]:
    """CPU and wall time of ``command`` between the steps FIRST and LAST."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    root, marks, deadline = psutil.Process(child.pid), [], time.monotonic() + PATIENCE_SECONDS
    for step in (FIRST, LAST):
        while not ((lines := read_metrics(progress)) and lines[-1]["step"] >= step):
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command}: step {step} was not reached")
            time.sleep(0.02)
        marks.append((time.monotonic(), processor_seconds(root)))
    if child.wait(PATIENCE_SECONDS) != 0:
        raise SystemExit(f"{command}: exit status {child.returncode}")
    (began, before), (ended, after) = marks
    spent = sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
    return {"seconds": ended - began, "cpu_seconds": spent}


def ours(directory: Path, name: str, checkpoint_seconds: float | None) -> dict[str, float]:
    path = recipe(directory, name, checkpoint_seconds)
    progress = directory / name / "metrics.jsonl"
    found = measure([sys.executable, "-m", "raylm.cli", "pretrain", str(path)], progress)
    lines = [line for line in read_metrics(progress) if FIRST < line["step"] <= LAST]
    # The last checkpoint ends the run; what it makes training wait is no interruption.
    found["checkpoint_seconds"] = sum(line["checkpoint_seconds"] for line in lines)
    found["memory_bytes"] = lines[-1]["memory_bytes"]
    return found


def bare(directory: Path, name: str) -> dict[str, float]:
    progress = directory / f"{name}.jsonl"
    script = [str(HERE / "engine_loop.py"), str(recipe(directory, name, None)), str(directory / "data"), str(progress)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return measure([*torchrun, *script], progress)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    memory = [sys.executable, str(HERE / "saving_memory.py"), str(WIDTH), str(LAYERS), str(VOCABULARY)]
    saving = subprocess.run(memory, check=True, timeout=PATIENCE_SECONDS, stdout=subprocess.PIPE, text=True)
    result: dict = {"saving_memory": json.loads(saving.stdout.splitlines()[-1]), "saving": [], "plain": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        prepare(directory)
        for number in range(rounds):
            result["bare"].append(bare(directory, f"bare{number}"))
            result["plain"].append(ours(directory, f"plain{number}", None))
            result["saving"].append(ours(directory, f"saving{number}", 20.0))

    def median(kind: str, key: str) -> float:
        return statistics.median(found[key] for found in result[kind])

    result["stall_share"] = median("saving", "checkpoint_seconds") / median("saving", "seconds")
    result["time_with_over_without_checkpoints"] = median("saving", "seconds") / median("plain", "seconds")
    result["cpu_seconds_over_bare_engine"] = median("plain", "cpu_seconds") / median("bare", "cpu_seconds")
    memory_found = result["saving_memory"]
    result["peak_extra_over_largest_chunk"] = memory_found["peak_extra_bytes"] / memory_found["largest_chunk_bytes"]
    text = json.dumps(result, indent=2)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)


if __name__ == "__main__":
    main()
