"""``raylm pretrain`` of a counted family: one pass, and a run that the other stages take, or refuse in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raylm.cli import run_stage
from raylm.config.loading import load_config
from raylm.data.loading import load_tokenizer
from raylm.data.tokens.shards import TokenShards
from raylm.errors import UserError
from raylm.evaluation.perplexity import TransformersScorer, figures, make_stream, score_stream
from raylm.models.loading import load_model
from raylm.reports.facts import headline
from raylm.reports.runs import open_run
from raylm.training.counting import read_documents
from raylm.training.inputs import validate as validate_training
from raylm.training.stage import pretrain


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture(scope="module")
def counted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a trigram model."""
    root = tmp_path_factory.mktemp("counted")
    path = write(
        root / "ngram.yaml",
        run={"name": "trigram", "storage": str(root)}, data={"train": str(prepared)},
        model={"family": "ngram", "config": {"order": 3}},
    )  # fmt: skip
    pretrain(load_config("pretrain", path, []))
    return root / "trigram"


def test_a_counted_model_is_scored_like_any_other(
    counted: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((counted / "report.json").read_text())
    tokens = read_documents(prepared, "train")
    assert report["tokens"] == len(tokens) - 1
    assert tokens[0] == tokens[-1] == TokenShards(prepared, "train").eos_id
    model, tokenizer = load_model(counted), load_tokenizer(counted / "model")
    # The held-out documents from their text, in windows that overlap.
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in TokenShards(prepared, "validation").documents()]
    stream = make_stream(texts, tokenizer)
    found = figures(stream, score_stream(stream, TransformersScorer(model), 64, 32, 4))
    assert found["cross_entropy"] == pytest.approx(report["validation_loss"], rel=1e-5)
    assert found["cross_entropy"] < 2 < np.log(len(tokenizer))
    assert report["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-2)
    assert headline(open_run(counted))["tokens, counted once"] == f"{len(tokens) - 1:,}"
    assert "counted once" in (counted / "summary.txt").read_text()
    run_stage("pretrain", counted.parent / "ngram.yaml", [])
    assert "is done already" in capsys.readouterr().out


def test_other_stages_refuse_it_before_anything_is_made(counted: Path, prepared: Path, tmp_path: Path) -> None:
    data, run = {"train": str(prepared)}, {"name": "next", "storage": str(tmp_path)}
    path = write(tmp_path / "f.yaml", run=run, data=data, model={"path": str(counted)}, training={"steps": 2})
    with pytest.raises(UserError, match=r"model.path: found .*, whose family ngram is counted .* trained further"):
        validate_training(load_config("finetune", path, []))
    from raylm.compression.stage import compress
    from raylm.parallel.plan.planning import make_plan

    path = write(tmp_path / "c.yaml", run=run, data=data, model={"path": str(counted)})
    with pytest.raises(UserError, match="whose family ngram is counted and has no weights to compress"):
        compress(load_config("compress", path, []))
    with pytest.raises(UserError, match=r"model.family: found ngram, which is counted on one machine"):
        make_plan(load_config("pretrain", counted.parent / "ngram.yaml", []))
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"steps": 5},
            "training.steps: found 5, allowed for the family ngram: leave it out, as its models",
        ),
        ({"epochs": 2}, "training.epochs: found 2.0, allowed for the family ngram: leave it out"),
        ({"optimizer": "muon"}, "training.optimizer: found muon, allowed for the family ngram: leave it out"),
        (3, "training"),
    ],
)
def test_how_long_to_train_is_not_asked(tmp_path: Path, training: Any, message: str) -> None:
    path = write(
        tmp_path / "p.yaml", run={"name": "a"}, data={"train": "x"}, model={"family": "ngram"}, training=training
    )
    with pytest.raises(UserError, match=message):
        load_config("pretrain", path, [])


def test_what_a_run_keeps_is_read_again(counted: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((counted / "config.yaml").read_text())
    del values["stage"]
    assert load_config("pretrain", write(tmp_path / "again.yaml", **values), []).training.epochs == 1
