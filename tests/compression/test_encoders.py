"""The ways of a classifier and a tagger from an encoder: trained, measured, made smaller and measured again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from raylm.compression import measuring
from raylm.compression import stage as compression
from raylm.config import load_config
from raylm.evaluation.stage import evaluate
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import finetune
from tests.reading import JOBS, NAMES, TOWNS, write_encoder
from tests.tagging import tagged_rows, write_columns


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model")


def write_labelled(path: Path, count: int, seed: int) -> Path:
    """Sentences about homes and about jobs, with their class."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name = draw.choice(NAMES)
        if draw.random() < 0.5:
            rows.append({"sentence": f"{name} lives in {draw.choice(TOWNS)} .", "about": "home"})
        else:
            rows.append({"sentence": f"{name} works as a {draw.choice(JOBS)} .", "about": "job"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_from_encoder_to_labels(
    ray_instance, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_labelled(tmp_path / "train.jsonl", 200, 0)
    validation = write_labelled(tmp_path / "validation.jsonl", 40, 1)
    fields = {"text": "sentence", "label": "about"}
    values = {
        "run": {"name": "classifier", "storage": str(tmp_path)},
        "data": {"train": str(train), "validation": str(validation), "fields": fields},
        "model": {"path": str(encoder)},
        "objective": {"type": "classification"},
        "training": {"steps": 20, "batch_size": 16, "sequence_length": 32, "learning_rate": 3e-3},
        "resources": {"workers": 2},
    }
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(values))
    finetune(load_config("finetune", path))
    run = tmp_path / "classifier"
    assert json.loads((run / "report.json").read_text())["logits_difference"] < 1e-4
    (*_, last) = (line for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line)
    assert last["validation_accuracy"] > 0.95
    model, info = AutoModelForSequenceClassification.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.id2label == {0: "home", 1: "job"}

    measured = {
        "data": {"train": str(validation), "fields": fields},
        "model": {"path": str(run)},
        "evaluation": {"sequence_length": 32},
    }
    values = measured | {"run": {"name": "evaluation", "storage": str(tmp_path)}, "resources": {"workers": 1}}
    path.write_text(yaml.safe_dump(values))
    evaluate(load_config("evaluate", path))
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["texts"] == 40
    assert report["accuracy"] > 95
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    assert 100 * np.mean([row["label"] == row["found"] for row in rows]) == pytest.approx(report["accuracy"])

    monkeypatch.setattr(measuring, "ROUNDS", 1)
    path.write_text(yaml.safe_dump(measured | {"run": {"name": "small", "storage": str(tmp_path)}}))
    compression.compress(load_config("compress", path))
    shown = capsys.readouterr().out
    assert "macro-F1, %" in shown and "same label" in shown and "osine" not in shown
    small = json.loads((tmp_path / "small" / "report.json").read_text())
    assert small["before"]["accuracy"] == pytest.approx(report["accuracy"])
    assert small["after"]["accuracy"] > 95
    assert 0.95 <= small["labels_agreement"] <= 1 and "outputs_cosine" not in small
    assert small["after"]["weight_bytes"] < 0.5 * small["before"]["weight_bytes"]
    assert all(small[side]["latency_milliseconds"][batch] > 0 for side in ("before", "after") for batch in ("1", "8"))
    assert (tmp_path / "small" / "model" / "openvino" / "openvino_model.xml").is_file()
    compression.compress(load_config("compress", path))
    assert "done already" in capsys.readouterr().out


@pytest.mark.slow
def test_from_encoder_to_tags(
    ray_instance, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_columns(tmp_path / "train.conll", tagged_rows(300, 0))
    validation = write_columns(tmp_path / "validation.conll", tagged_rows(40, 1))
    values = {
        "run": {"name": "tagger", "storage": str(tmp_path)},
        "data": {"train": str(train), "validation": str(validation)},
        "model": {"path": str(encoder)},
        "objective": {"type": "tagging"},
        "training": {"steps": 40, "batch_size": 16, "sequence_length": 16, "learning_rate": 3e-3, "warmup_steps": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    finetune(load_config("finetune", path))
    run = tmp_path / "tagger"
    assert json.loads((run / "report.json").read_text())["logits_difference"] < 1e-4
    measured = {"data": {"train": str(validation)}, "model": {"path": str(run)}}
    values = measured | {"run": {"name": "evaluation", "storage": str(tmp_path)}, "resources": {"workers": 1}}
    path.write_text(yaml.safe_dump(values))
    evaluate(load_config("evaluate", path))
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["sentences"] == 40 and set(report["labels"]) == {"LOC", "PER"}
    assert report["span_f1"] > 95
    low, high = report["span_f1_interval"]
    assert low <= report["span_f1"] <= high
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "tags.jsonl").read_text().splitlines()]
    right = [tag == found for row in rows for tag, found in zip(row["tags"], row["found"], strict=True)]
    assert 100 * np.mean(right) == pytest.approx(report["token_accuracy"])
    assert "F1 " in capsys.readouterr().out

    monkeypatch.setattr(measuring, "ROUNDS", 1)
    path.write_text(yaml.safe_dump(measured | {"run": {"name": "small", "storage": str(tmp_path)}}))
    compression.compress(load_config("compress", path))
    shown = capsys.readouterr().out
    assert "F1 of spans, %" in shown and "of the words the same tag as the original" in shown and "osine" not in shown
    small = json.loads((tmp_path / "small" / "report.json").read_text())
    assert small["before"]["span_f1"] == pytest.approx(report["span_f1"])
    assert small["after"]["span_f1"] > 95
    assert 0.95 <= small["tags_agreement"] <= 1
    assert small["after"]["weight_bytes"] < 0.5 * small["before"]["weight_bytes"]
