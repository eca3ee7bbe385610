"""An encoder trained to a classifier by ``raylm finetune`` and by the Trainer of transformers, in turns.

Sentence polarity (Pang and Lee 2005, two classes; a tenth is held out by the seed) and question classification (Li and
Roth 2002, six classes; the set's own test questions). Both train one process with as many threads, the same steps,
optimizer and schedule. Prints and writes held-out accuracy and tokens a second of training. Needs accelerate.

    python tests/benchmarks/classifier_training.py ENCODER OUT.json --polarity sentence_polarity.zip --questions qc.zip
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from classifier_sets import Rows, polarity, questions, write

BATCH, LENGTH, RATE, DECAY, WARMUP = 32, 64, 1e-4, 0.01, 0.1
THREADS = os.cpu_count() or 1


def by_raylm(encoder: str, train: Rows, held_out: Rows, steps: int, seed: int, directory: Path) -> dict[str, float]:
    """Accuracy and tokens a second of ``raylm finetune``, by its own records."""
    file = {
        "run": {"name": f"raylm-{seed}", "storage": str(directory), "seed": seed},
        "data": {
            "train": write(directory / "train.csv", train), "validation": write(directory / "held-out.csv", held_out)
        },
        "model": {"path": encoder},
        "objective": {"type": "classification"},
        "training": {
            "steps": steps, "batch_size": BATCH, "sequence_length": LENGTH, "learning_rate": RATE,
            "weight_decay": DECAY, "warmup_steps": int(steps * WARMUP), "schedule": "linear", "precision": "fp32",
        },
        "resources": {"workers": 1, "cpus_per_worker": THREADS},
    }  # fmt: skip
    path = directory / f"raylm-{seed}.yaml"
    path.write_text(json.dumps(file))
    subprocess.run([sys.executable, "-m", "raylm.cli", "finetune", str(path)], check=True)
    lines = [json.loads(line) for line in (directory / f"raylm-{seed}" / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    final = next(line for line in reversed(lines) if "validation_accuracy" in line)
    return {"accuracy": final["validation_accuracy"], "tokens_per_second": speeds[len(speeds) // 2]}


def by_trainer(encoder: str, train: Rows, held_out: Rows, steps: int, seed: int, directory: Path) -> dict[str, float]:
    """The same by transformers' Trainer, in a process of its own; texts padded to the longest of a batch."""
    case = {"encoder": encoder, "train": train, "held_out": held_out, "steps": steps, "seed": seed}
    given, output = directory / "case.json", directory / "trainer.json"
    given.write_text(json.dumps(case))
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--trainer", str(given), str(output), str(directory / f"trainer-{seed}")]
    subprocess.run(command, check=True, env=environment)
    return json.loads(output.read_text())


def train_here(case: dict[str, Any], directory: str) -> dict[str, float]:
    """What :func:`by_trainer` has another process do."""
    import numpy as np
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    set_seed(case["seed"])
    labels = sorted({label for _, label in case["train"]})
    tokenizer = AutoTokenizer.from_pretrained(case["encoder"])
    model = AutoModelForSequenceClassification.from_pretrained(
        case["encoder"], num_labels=len(labels), dtype=torch.float32
    )

    def rows(part: Rows) -> list[dict[str, Any]]:
        texts = tokenizer([text for text, _ in part], truncation=True, max_length=LENGTH)["input_ids"]
        return [{"input_ids": ids, "labels": labels.index(label)} for ids, (_, label) in zip(texts, part, strict=True)]

    class Speed(TrainerCallback):
        """Tokens of the texts, without padding, and the seconds of the steps."""

        tokens, began = 0, 0.0

        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            self.began = time.perf_counter()

    speed = Speed()
    pad = DataCollatorWithPadding(tokenizer)

    def collate(batch: list[dict[str, Any]]) -> Any:
        speed.tokens += sum(len(row["input_ids"]) for row in batch)
        return pad(batch)

    trainer = Trainer(
        model,
        TrainingArguments(
            directory, max_steps=case["steps"], per_device_train_batch_size=BATCH, learning_rate=RATE,
            weight_decay=DECAY, warmup_steps=int(case["steps"] * WARMUP), lr_scheduler_type="linear",
            adam_beta2=0.95, report_to=[], save_strategy="no", use_cpu=True, seed=case["seed"], disable_tqdm=True,
        ),
        train_dataset=rows(case["train"]),
        eval_dataset=rows(case["held_out"]),
        data_collator=collate,
        compute_metrics=lambda found: {"accuracy": float(np.mean(found[0].argmax(-1) == found[1]))},
        callbacks=[speed],
    )  # fmt: skip
    trainer.train()
    rate = speed.tokens / (time.perf_counter() - speed.began)
    return {"accuracy": trainer.evaluate()["eval_accuracy"], "tokens_per_second": rate}


def main() -> None:
    if sys.argv[1:2] == ["--trainer"]:
        Path(sys.argv[3]).write_text(json.dumps(train_here(json.loads(Path(sys.argv[2]).read_text()), sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--polarity", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, nargs=2, default=(1.0, 4.0), help="of polarity and of questions")
    given, result = parser.parse_args(), []
    for seed in range(given.seeds):
        sets = {}
        if given.polarity:
            sets["polarity"] = (*polarity(given.polarity, 0), given.epochs[0])
        if given.questions:
            sets["questions"] = (*questions(given.questions), given.epochs[1])
        for name, (train, held_out, epochs) in sets.items():
            steps = round(len(train) * epochs / BATCH)
            for system in (by_raylm, by_trainer) if seed % 2 == 0 else (by_trainer, by_raylm):
                with tempfile.TemporaryDirectory() as directory:
                    found = system(given.encoder, train, held_out, steps, seed, Path(directory))
                result.append({"set": name, "seed": seed, "system": system.__name__, "steps": steps, **found})
                print(json.dumps(result[-1]), flush=True)
                given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
