"""Does a student learn more from a teacher than alone, on the same tokens from the same start?

    python tests/benchmarks/distilled_student.py STUDENT TEACHER DATA OUTPUT.json [--tokens 400000] [--rates 5e-4,1e-3]

STUDENT and TEACHER are model directories of one tokenizer, DATA a prepared set. Each way of learning is trained with
each learning rate; OUTPUT has its validation losses, nats a token, after each evaluation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from raylm.training.reports.metrics import read_metrics

WAYS: dict[str, dict[str, float] | None] = {
    "alone": None,
    "logits": {"logits": 1.0},
    "logits, temperature 2": {"logits": 1.0, "temperature": 2.0},
    "logits and targets": {"logits": 0.5, "targets": 0.5},
    "logits, targets, hidden states": {"logits": 0.5, "targets": 0.5, "hidden": 0.1},
}


def losses(given: argparse.Namespace, way: str, rate: float, directory: Path) -> list[dict[str, float]]:
    """Validation losses of one run, by step."""
    values: dict[str, Any] = {
        "run": {"name": "run", "storage": str(directory)},
        "data": {"train": given.data},
        "model": {"path": given.student},
        "objective": {"type": "causal"},
        "training": {
            "tokens": given.tokens, "batch_size": given.batch_size, "sequence_length": given.length,
            "learning_rate": rate, "weight_decay": 0.0, "warmup_steps": 10, "precision": "bf16",
            "evaluate_every_steps": 50, "evaluation_batches": given.evaluation_batches,
        },
        "resources": {"workers": 2},
    }  # fmt: skip
    if (distillation := WAYS[way]) is not None:
        values["distillation"] = {"teacher": given.teacher, **distillation}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    subprocess.run([sys.executable, "-m", "raylm.cli", "finetune", str(path)], check=True, stdout=sys.stderr)
    lines = read_metrics(directory / "run" / "metrics.jsonl")
    return [{name: line[name] for name in ("step", "validation_loss")} for line in lines if "validation_loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rates", default="5e-4")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--evaluation-batches", type=int, default=32)
    given = parser.parse_args()
    found = []
    for rate in map(float, given.rates.split(",")):
        for way in given.ways.split(";"):
            with tempfile.TemporaryDirectory() as directory:
                rows = losses(given, way, rate, Path(directory))
            found.append({"way": way, "learning_rate": rate, "losses": rows})
            print(f"{way}, {rate:g}: {rows[-1]['validation_loss']:.4f} nats a token", flush=True)
            given.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
