"""What a stage finds wrong late leaves nothing, so that the corrected file begins the run."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from raylm.cli import STAGE_FUNCTIONS
from raylm.config.stages import STAGES
from raylm.errors import UserError

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def run(stage: str, directory: Path, **sections: Any) -> None:
    """Run ``stage`` as ``raylm`` does."""
    values = {"run": {"name": "one", "storage": str(directory / "new" / "runs")}, **sections}
    module, name = STAGE_FUNCTIONS[stage]
    getattr(import_module(module), name)(STAGES[stage].model_validate(values))


def text(directory: Path) -> dict[str, Any]:
    (directory / "lines.txt").write_text("".join(f"line {number} of a short text\n" for number in range(60)))
    return {"train": str(directory / "lines.txt"), "text_unit": "line", "validation_fraction": 0.2}


def pairs(directory: Path) -> dict[str, Any]:
    rows = [{"prompt": f"fox {number}?", "answer": "jumps over the dog"} for number in range(40)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(directory / "pairs.jsonl"), "validation_fraction": 0.2}


def pretrain(directory: Path, model: Path, data: dict[str, Any] | None = None, length: int = 32) -> None:
    run(
        "pretrain",
        directory,
        data={**text(directory), **(data or {})},
        tokenizer={"vocab_size": 280},
        model={"family": "llama", "config": LLAMA},
        training={"steps": 2, "batch_size": 2, "sequence_length": length},
        resources={"workers": 1},
    )


def finetune(directory: Path, model: Path, stage: str = "finetune", **sections: Any) -> None:
    data = {**pairs(directory), "cleaning": {"length": {"min_characters": 10_000}}}
    training = {"steps": 2, "batch_size": 2, "sequence_length": 64}
    run(stage, directory, data=data, model={"path": str(model)}, training=training, **sections)


def damaged(directory: Path, model: Path) -> str:
    """A copy of the model whose weights are cut off."""
    copy = shutil.copytree(model, directory / "damaged")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return str(copy)


def prepare(directory: Path, model: Path) -> None:
    run("prepare", directory, data={**text(directory), "cleaning": {"length": {"min_characters": 10_000}}})


def with_damaged(stage: str) -> Callable[[Path, Path], None]:
    def act(directory: Path, model: Path) -> None:
        sections = {} if stage == "serve" else {"data": text(directory)}
        run(stage, directory, model={"path": damaged(directory, model)}, **sections)

    return act


SPACE = {"space": {"training.learning_rate": {"grid": [1e-6, 1e-2]}}}
CASES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "prepare, nothing left": (prepare, "no document that is not empty"),
    "pretrain, too long": (lambda *given: pretrain(*given, length=4096), "training.sequence_length: found 4096"),
    "pretrain, no validation": (
        lambda *given: pretrain(*given, data={"validation_fraction": 0}),
        "data.validation_fraction: found 0, which leaves no documents for validation",
    ),
    "pretrain, nothing left": (
        lambda *given: pretrain(*given, data={"cleaning": {"length": {"min_characters": 10_000}}}),
        "no document that is not empty",
    ),
    "finetune, nothing left": (finetune, "no document that is not empty"),
    "tune, nothing left": (lambda *given: finetune(*given, stage="tune", tuning=SPACE), "no document that is not"),
    "evaluate, damaged model": (with_damaged("evaluate"), "is damaged"),
    "compress, damaged model": (with_damaged("compress"), "is damaged"),
    "serve, damaged model": (with_damaged("serve"), "is damaged"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_leaves_nothing(case: str, ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    act, expected = CASES[case]
    with pytest.raises(UserError) as caught:
        act(tmp_path, tiny_model)
    assert expected in str(caught.value)
    # The frames of the error hold workers, which hold CPUs.
    del caught
    gc.collect()
    assert not (tmp_path / "new").exists()


def test_ray_that_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    config = tmp_path / "prepare.yaml"
    values = {"run": {"name": "one", "storage": str(tmp_path / "new" / "runs")}, "data": text(tmp_path)}
    config.write_text(json.dumps(values))
    done = subprocess.run(
        [sys.executable, "-m", "raylm.cli", "prepare", str(config)],
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("raylm: error: RAY_ADDRESS: found 127.")
    assert not (tmp_path / "new").exists()
