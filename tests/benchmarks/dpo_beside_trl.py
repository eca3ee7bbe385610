"""The losses of preference tuning beside those of TRL's DPOTrainer, on the same pairs in the same order.

Prints and writes the losses of both, and the largest difference. TRL needs an environment of its own that has raylm.

    python tests/benchmarks/dpo_beside_trl.py MODEL PAIRS.jsonl OUT.json [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from raylm.data.samples.preferences import PreferenceSamples

BATCH, LENGTH, RATE, BETA = 4, 256, 1e-3, 0.1


def by_raylm(model: str, pairs: str, steps: int, directory: Path, workers: int, zero: int) -> list[float]:
    """The losses of ``raylm finetune``, step by step."""
    name = f"workers-{workers}-zero-{zero}"
    file = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": pairs, "validation_fraction": 0.1},
        "model": {"path": model},
        "objective": {"type": "preference", "beta": BETA},
        "training": {
            "steps": steps, "batch_size": BATCH, "sequence_length": LENGTH, "learning_rate": RATE, "weight_decay": 0.0,
            "schedule": "constant", "log_every_steps": 1, "precision": "fp32", "gradient_clipping": 1.0,
        },
        "parallel": {"zero_stage": zero},
        "resources": {"workers": workers},
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(file))
    subprocess.run([sys.executable, "-m", "raylm.cli", "finetune", str(path)], check=True)
    lines = (directory / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def in_order(samples: PreferenceSamples, count: int) -> list[dict[str, list[int]]]:
    """The pairs as TRL's collator takes them, in the order in which raylm trains on them."""
    rows = []
    for number in range(count):
        batch = samples.batch(np.array([number]))
        row: dict[str, list[int]] = {}
        for side, ids, labels in zip(("chosen", "rejected"), batch["input_ids"][0], batch["labels"][0], strict=True):
            (answer,) = np.nonzero(labels >= 0)
            row["prompt_ids"] = ids[: answer[0] + 1].tolist()
            row[f"{side}_ids"] = labels[answer].tolist()
        rows.append(row)
    return rows


def by_trl(model: str, rows: list[dict[str, list[int]]], steps: int, directory: Path) -> list[float]:
    """The losses of DPOTrainer."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []

    class Witness(DPOTrainer):
        """Takes tokens as they are, in their order, and keeps each loss as it is."""

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **named: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *arguments: Any, **named: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            found = super().compute_loss(*arguments, **named)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Witness(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        DPOConfig(
            output_dir=str(directory / "trl"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE,
            weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, lr_scheduler_type="constant", beta=BETA, use_cpu=True,
            bf16=False, gradient_checkpointing=False, max_length=LENGTH + 1, save_strategy="no", report_to=[],
            max_grad_norm=1.0,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = {
            f"raylm, workers {workers}, ZeRO {zero}": by_raylm(
                given.model, str(Path(given.pairs).resolve()), given.steps, directory, workers, zero
            )
            for workers, zero in ((1, 0), (2, 3))
        }
        samples = PreferenceSamples(directory / "workers-1-zero-0" / "data", "train", 0)
        found["trl"] = by_trl(given.model, in_order(samples, given.steps * BATCH), given.steps, directory)
    differences = {
        name: max(abs(one - other) for one, other in zip(losses, found["trl"], strict=True))
        for name, losses in found.items()
    }
    given.output.write_text(json.dumps({"losses": found, "differences": differences}, indent=2) + "\n")
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
