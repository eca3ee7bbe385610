"""Class weights and dropout in whole runs: parity with a plain loop, and what is exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, GPT2Config, T5Config

from raylm.config import load_config
from raylm.data.samples.labelled import LabelledSamples
from raylm.errors import UserError
from raylm.models.families.build import check_dropout, dropout_of, with_dropout
from raylm.training.inputs import validate
from raylm.training.reports.metrics import read_metrics
from tests.training.classifiers import write_encoder, write_rows, write_run
from tests.training.loops import run_case, run_loops

PLAIN = {"steps": 12, "evaluate_every_steps": None, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.05,
         "gradient_clipping": 0.0, "weight_decay": 0.0}  # fmt: skip


def test_every_dropout_of_a_configuration_is_set() -> None:
    changed = with_dropout(BertConfig(classifier_dropout=0.4), 0.25)
    assert dropout_of(changed) == dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.25
    )
    for config, keys in ((GPT2Config(), {"resid_pdrop", "embd_pdrop", "attn_pdrop"}), (T5Config(), {"dropout_rate"})):
        assert keys <= set(dropout_of(config))
    own = dropout_of(GPT2Config(resid_pdrop=0.3))
    assert dropout_of(with_dropout(with_dropout(GPT2Config(), 0.5), own)) == own


def test_dropout_without_a_place_is_refused() -> None:
    class Bare(BertConfig):
        model_type = "bare"

        def to_dict(self) -> dict:
            return {key: value for key, value in super().to_dict().items() if "dropout" not in key}

    with pytest.raises(UserError, match=r"training.dropout: found 0.1, allowed for a bare model: leave it out"):
        check_dropout(Bare(), 0.1)


@pytest.mark.slow
def test_weighted_and_smoothed_run_is_a_plain_loop(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", dropout=0.0)
    write_rows(tmp_path / "train.csv", 96, 1)
    write_rows(tmp_path / "dev.csv", 16, 2)
    objective = {"class_weights": "balanced", "label_smoothing": 0.1}
    path = write_run(tmp_path, "one", training=PLAIN, objective=objective)
    cut = ["run.name=cut", "parallel.zero_stage=2", "parallel.micro_batch_size=2"]
    run_loops(run_case(path, stage="finetune"), run_case(path, *cut, workers=2, stage="finetune"))
    samples = LabelledSamples(tmp_path / "one" / "data", "train", 0)
    counts = torch.tensor(samples.label_counts(3), dtype=torch.float32)
    weights = counts.sum() / (3 * counts)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one" / "model").train()
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "cut")}
    assert [line["loss"] for line in lines["cut"]] == pytest.approx([line["loss"] for line in lines["one"]], abs=2e-6)
    # The loss of one more step, from the exported weights by torch alone.
    taken = samples.batch(np.arange(12 * 16, 13 * 16))
    batch = {name: torch.from_numpy(values) for name, values in taken.items()}
    targets = batch.pop("targets")[:, 0]
    loss = functional.cross_entropy(model(**batch).logits, targets, weights, label_smoothing=0.1, reduction="sum") / 16
    (more,) = run_loops(run_case(path, "training.steps=13", stage="finetune"))
    assert more["step"] == 13
    assert read_metrics(tmp_path / "one" / "metrics.jsonl")[-1]["loss"] == pytest.approx(loss.item(), abs=2e-6)


@pytest.mark.slow
def test_dropout_of_a_run_is_not_the_model_s(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", dropout=0.05)
    write_rows(tmp_path / "train.csv", 48, 1)
    write_rows(tmp_path / "dev.csv", 16, 2)
    path = write_run(tmp_path, "own", training={**PLAIN, "steps": 2})
    names = {
        "own": [],
        "high": ["run.name=high", "training.dropout=0.6"],
        "same": ["run.name=same", "training.dropout=0.05"],
    }
    run_loops(*(run_case(path, *more, stage="finetune") for more in names.values()))
    losses = {name: [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in names}
    assert losses["own"] == losses["same"]
    assert abs(losses["high"][0] - losses["own"][0]) > 1e-3
    assert AutoConfig.from_pretrained(tmp_path / "high" / "model").hidden_dropout_prob == 0.05


def test_a_weight_of_a_label_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    write_rows(tmp_path / "train.csv", 40, 1)
    write_rows(tmp_path / "dev.csv", 10, 2)
    path = write_run(tmp_path, "refused", objective={"class_weights": {"calm": 1.0, "lout": 2.0}})
    with pytest.raises(UserError, match=r"objective.class_weights: found the label 'lout', allowed: calm, loud, rare"):
        validate(load_config("finetune", path))
