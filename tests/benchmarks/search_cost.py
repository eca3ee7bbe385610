"""Steps and time of a search with ASHA, beside all of its trials to their end: each trial on two workers.

Sixteen points, eight learning rates by two schedules, of a small encoder, drawn at random with the tokenizer of
ENCODER, that becomes a classifier of questions (Li and Roth 2002). Prints and writes the share of the steps, the
seconds of each search and between trials, and the accuracy of what both searches choose.

    python tests/benchmarks/search_cost.py ENCODER OUT.json --questions qc.zip
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from classifier_sets import questions, write

STEPS, EVALUATIONS = 240, 8
RATES, SCHEDULES = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], ["linear", "constant"]


def small(encoder: str, directory: Path) -> str:
    """An encoder of two layers with the tokenizer of ``encoder``."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def search(name: str, scheduler: str, encoder: str, directory: Path) -> dict[str, Any]:
    """``raylm tune`` over all points; its report, with its seconds."""
    file = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(directory / "train.csv"), "validation": str(directory / "held-out.csv")},
        "model": {"path": encoder},
        "objective": {"type": "classification"},
        "training": {
            "steps": STEPS, "sequence_length": 64, "evaluate_every_steps": STEPS // EVALUATIONS,
            "evaluation_batches": 16, "batch_size": 32,
        },
        "tuning": {
            "searcher": "grid", "scheduler": scheduler, "metric": "validation_accuracy",
            "space": {"training.learning_rate": {"choice": RATES}, "training.schedule": {"choice": SCHEDULES}},
        },
        "resources": {"workers": 2},
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(file))
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "raylm.cli", "tune", str(path)], check=True)
    report = json.loads((directory / name / "report.json").read_text())
    rows = report["trials"]
    return {
        "seconds": time.monotonic() - began,
        "steps": sum(row["step"] or 0 for row in rows),
        "ends": {end: sum(row["status"] == end for row in rows) for end in ("finished", "stopped", "failed")},
        "best": report["best"],
        "gaps": gaps(directory / name / "trials"),
    }


def gaps(trials: Path) -> list[float]:
    """Seconds from the last metrics of a trial to the first of the next one, where one runs at a time and pauses."""
    lines = sorted(
        (json.loads(line)["time"], path.parent.name)
        for path in trials.glob("*/metrics.jsonl")
        for line in path.read_text().splitlines()
    )
    return [later - time for (time, trial), (later, other) in itertools.pairwise(lines) if trial != other]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        train, held_out = questions(given.questions)
        write(directory / "train.csv", train)
        write(directory / "held-out.csv", held_out)
        encoder = small(given.encoder, directory / "encoder")
        found = {scheduler: search(scheduler, scheduler, encoder, directory) for scheduler in ("none", "asha")}
    result = {
        **found,
        "share_of_steps": found["asha"]["steps"] / found["none"]["steps"],
        "points_behind": 100
        * (found["none"]["best"]["validation_accuracy"] - found["asha"]["best"]["validation_accuracy"]),
    }
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("share_of_steps", "points_behind")}))


if __name__ == "__main__":
    main()
