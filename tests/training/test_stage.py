"""Pretraining and fine-tuning under real Ray Train workers: results, resuming after kills, and refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylm.config import load_config
from raylm.config.data import DataSection
from raylm.data.samples.evaluation_texts import evaluation_texts
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import finetune, pretrain

STEPS = 24


def write_config(directory: Path, prepared: Path, name: str, **training) -> Path:
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(prepared)},
        "model": {
            "family": "llama",
            "config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "tie_word_embeddings": True,
            },
        },
        "training": {
            "steps": STEPS, "batch_size": 4, "sequence_length": 32, "learning_rate": 0.005, "log_every_steps": 1,
            **training,
        },
        "parallel": {"zero_stage": 1},
        "resources": {"workers": 2},
        "checkpoint": {"every_steps": 5, "every_seconds": None},
    }  # fmt: skip
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def finished(ray_instance, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted run."""
    directory = tmp_path_factory.mktemp("runs")
    pretrain(load_config("pretrain", write_config(directory, prepared, "whole", evaluate_every_steps=12)))
    return directory / "whole"


def losses(run: Path) -> list[float]:
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "each step stands there once"
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_run_directory_holds_what_the_design_says(finished: Path, prepared: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert losses(finished)[-1] < losses(finished)[0] - 0.5
    assert {"step", "tokens", "samples", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu"} <= set(
        lines[0]
    )
    assert [line["step"] for line in lines if "validation_loss" in line] == [12, 24]
    report = json.loads((finished / "report.json").read_text())
    assert report["logits_difference"] < 1e-4
    summary = (finished / "summary.txt").read_text()
    assert f"{STEPS} steps" in summary
    assert f"{lines[-1]['validation_loss']:.4f} nats at the end" in summary
    assert re.search(r"^restarts +none$", summary, re.MULTILINE)
    shards = TokenShards(prepared, "validation")
    nats = report["validation_loss"] * (shards.token_count - 1)
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / shards.byte_count)
    assert report["validation_bytes"] == sum(
        len(text.encode()) for text in evaluation_texts(DataSection(train=str(prepared)))
    )
    assert (finished / "checkpoints" / "LATEST").read_text().strip() == f"step-{STEPS:08d}"
    assert any((finished / "tensorboard").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    ids = tokenizer("12 apples and", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.slow
def test_done_run_is_not_repeated_and_another_configuration_is_refused(
    finished: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.parent / "whole.yaml"
    began = (finished / "metrics.jsonl").stat().st_mtime
    pretrain(load_config("pretrain", path))
    assert "done already" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime == began
    with pytest.raises(UserError, match=r"training\.learning_rate \(was 0\.005, now 0\.1\)"):
        pretrain(load_config("pretrain", path, ["training.learning_rate=0.1"]))


@pytest.mark.slow
def test_finetune_learns_the_answers_and_stops_early(finished: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} apples?", "answer": "yes"} for i in range(60)]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    original = shutil.copytree(finished / "model", tmp_path / "original")
    stops = json.loads((original / "generation_config.json").read_text())
    (original / "generation_config.json").write_text(json.dumps(stops | {"eos_token_id": [7, stops["eos_token_id"]]}))
    values = {
        "run": {"name": "tuned", "storage": str(tmp_path)},
        "data": {"train": str(source), "validation_fraction": 0.2},
        "model": {"path": str(original)},
        "training": {
            "steps": 400, "batch_size": 4, "sequence_length": 32, "learning_rate": 0.01, "schedule": "constant",
            "evaluate_every_steps": 10, "early_stopping": {"patience": 2, "minimum_change": 0.01},
        },
        "resources": {"workers": 2},
    }  # fmt: skip
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(values))
    finetune(load_config("finetune", path))
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert report["stopped_early"]
    assert report["best_validation_loss"] < 0.2
    assert report["exported_step"] <= report["step"] < 400
    # What ended the original's answers ends this one's.
    kept = json.loads((tmp_path / "tuned" / "model" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [stops["eos_token_id"], 7]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.config.hidden_sice=8", "model.config.hidden_sice: no such key in the llama configuration"),
        ("model.config.num_attention_heads=5", "(32) is not a multiple of the number of attention heads (5)"),
        ("model.config.max_position_embeddings=16", "training.sequence_length: found 32, allowed: at most the model"),
        ("parallel.data=3", "parallel.data: found 3, allowed: auto or 2"),
        ("training.batch_size=5", "training.batch_size: found 5, allowed: a multiple of the 2 data-parallel workers"),
        ("resources.workers=64", "multiple of the 64 data-parallel workers"),
        ("parallel.tensor=2 parallel.zero_stage=2", "parallel.zero_stage: found 2, allowed with parallel.tensor"),
        ("parallel.tensor=3 resources.workers=3", "parallel.tensor: found 3, allowed: a divisor of the model's num_at"),
        ("parallel.pipeline=4 resources.workers=4", "parallel.pipeline: found 4, allowed: at most the model's 2"),
        ("parallel.pipeline=4", "resources.workers: found 2, allowed: auto or a multiple of parallel.ten"),
        ("parallel.tensor=2 parallel.data=2", "parallel.data: found 2, allowed: auto or 1"),
        ("parallel.tensor=2 training.optimizer=muon", "training.optimizer: found muon, allowed with parallel.tensor"),
        ("parallel.tensor=2 model.config.num_key_value_heads=1", "divisor of the model's num_key_value_heads (1)"),
        ("parallel.tensor=2 model.config.intermediate_size=63", "divisor of the model's intermediate_size (63)"),
        ("parallel.data=4 parallel.tensor=auto", "parallel.data: found 4, allowed: auto or a divisor of 2"),
        ("data.train=nowhere.txt", "nowhere.txt"),
        ("training.sequence_length=1000000", "training.sequence_length"),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(prepared: Path, tmp_path: Path, override: str, expected: str) -> None:
    path = write_config(tmp_path, prepared, "refused")
    overrides = override.split(" ")
    if override.startswith("training.sequence_length"):
        overrides.append("model.config.max_position_embeddings=2000000")
    with pytest.raises(UserError) as caught:
        pretrain(load_config("pretrain", path, overrides))
    assert expected in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_damaged_prepared_data_is_refused(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "prepared"
    shutil.copytree(prepared, copy)
    tokens = next((copy / "train").glob("*.bin"))
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(UserError, match=r"tokens-00000\.bin: damaged shard: wrong checksum"):
        pretrain(load_config("pretrain", write_config(tmp_path, copy, "refused")))
    assert not (tmp_path / "refused").exists()


def test_data_of_another_tokenizer_is_refused(prepared: Path, tiny_model: Path, tmp_path: Path) -> None:
    values = {
        "run": {"name": "refused", "storage": str(tmp_path)},
        "data": {"train": str(prepared)},
        "model": {"path": str(tiny_model)},
        "training": {"steps": 1, "batch_size": 2, "sequence_length": 32},
    }
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"prepared with another tokenizer than that of model\.path"):
        finetune(load_config("finetune", path))
    assert not (tmp_path / "refused").exists()
