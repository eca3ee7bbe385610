"""raylm pretraining against a plain DDP loop under torchrun: same GPT-2, batch and threads, two workers, interleaved.

``python tests/benchmarks/ddp_throughput.py [ROUNDS] [OUTPUT.json]`` writes every round's tokens per second, the ratio
of the medians, and model FLOPs utilisation (formula: raylm.training.loop.flops) against the machine's own fp32
matrix-product peak on two threads, measured beside each round.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from raylm.training.loop.flops import FORMULA, flops_per_token

STEPS, BATCH_SIZE, LENGTH, LAYERS, WIDTH, HEADS = 20, 16, 256, 12, 256, 8
HERE = Path(__file__).parent


def plain(vocabulary: int) -> float:
    arguments = [STEPS, BATCH_SIZE, LENGTH, vocabulary, LAYERS, WIDTH, HEADS]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "ddp_loop.py"),
         *map(str, arguments)],
        capture_output=True, text=True, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(result.stdout.strip().splitlines()[-1])["tokens_per_second"]


def prepare(directory: Path) -> int:
    words = [f"w{i}" for i in range(2000)]
    generator = random.Random(0)
    (directory / "text.txt").write_text(
        "\n".join(" ".join(generator.choices(words, k=200)) for _ in range(600)), encoding="utf-8"
    )
    config = {
        "run": {"name": "data", "storage": str(directory)},
        "data": {"train": str(directory / "text.txt"), "text_unit": "line"},
        "tokenizer": {"type": "bpe", "vocab_size": 2048},
    }
    run("prepare", directory, config)
    return json.loads((directory / "data" / "manifest.json").read_text())["vocab_size"]


def run(stage: str, directory: Path, config: dict) -> None:
    path = directory / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "raylm.cli", stage, str(path)], check=True, timeout=600)


def ours(directory: Path, number: int) -> float:
    name = f"round{number}"
    config = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(directory / "data")},
        "model": {"family": "gpt2", "config": {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS}},
        "training": {
            "steps": STEPS + 5, "batch_size": BATCH_SIZE, "sequence_length": LENGTH, "log_every_steps": 5,
            "evaluation_batches": 1, "precision": "fp32",
        },
        "parallel": {"zero_stage": 0},
        "checkpoint": {"every_seconds": None},
        "resources": {"workers": 2},
    }  # fmt: skip
    run("pretrain", directory, config)
    lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()][1:]
    # Intervals have equally many tokens, so their harmonic mean is the speed over all of them.
    return statistics.harmonic_mean([line["tokens_per_second"] for line in lines])


def machine_peak() -> float:
    """FLOP/s of fp32 matrix products on two threads, in a process of its own."""
    code = (
        "import torch; from raylm.training.loop.flops import peak_flops; torch.set_num_threads(2); "
        "print(peak_flops(torch.device('cpu'), seconds=3.0))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    return float(result.stdout)


def model_flops(vocabulary: int) -> tuple[float, int]:
    """Training FLOPs a token of the benchmark's model, and its parameters."""
    config = GPT2Config(vocab_size=vocabulary, n_positions=LENGTH, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    return flops_per_token(model, LENGTH), model.num_parameters()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    result: dict = {"formula": FORMULA, "plain": [], "raylm": [], "peak_flops": []}
    with tempfile.TemporaryDirectory() as directory:
        vocabulary = prepare(Path(directory))
        for number in range(rounds):
            result["peak_flops"].append(machine_peak())
            result["plain"].append(plain(vocabulary))
            result["raylm"].append(ours(Path(directory), number))
    speed = {engine: statistics.median(result[engine]) for engine in ("plain", "raylm")}
    flops, result["parameters"] = model_flops(vocabulary)
    result["ratio_of_medians"] = speed["raylm"] / speed["plain"]
    result["flops_per_token"] = flops
    result["mfu"] = speed["raylm"] * flops / statistics.median(result["peak_flops"])
    text = json.dumps(result, indent=2)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
