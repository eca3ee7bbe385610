"""From text to a model that transformers loads: BERT by the whole stage on two Ray Train workers, T5 by the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from raylm.config import load_config
from raylm.config.data import TokenizerSection
from raylm.data.prepare.stage import prepare_directory
from raylm.errors import UserError
from raylm.evaluation.stage import evaluate
from raylm.models.loading import load_model
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import pretrain
from tests.training.loops import run_case, run_loops

CONFIGS = {
    "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
}


def write_config(directory: Path, family: str, **sections: dict) -> Path:
    text = directory / "text.txt"
    text.write_text("\n".join(f"{i} apples and {i * i} pears make {i + i * i} fruits in all" for i in range(200)))
    values = {
        "run": {"name": family, "storage": str(directory)},
        "data": {"train": str(text), "text_unit": "line", "validation_fraction": 0.1},
        "tokenizer": {"type": "byte"},
        "model": {"family": family, "config": CONFIGS[family]},
        "training": {
            "steps": 40, "batch_size": 4, "sequence_length": 48, "learning_rate": 0.01, "log_every_steps": 1,
            "evaluate_every_steps": 20,
        },
        "parallel": {"zero_stage": 1},
        "resources": {"workers": 2},
    }  # fmt: skip
    path = directory / f"{family}.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("family", "zero_stage"), [("bert", 1), ("t5", 3)])
def test_a_family_trains_and_its_model_loads(ray_instance, tmp_path: Path, family: str, zero_stage: int) -> None:
    config, run = write_config(tmp_path, family), tmp_path / family
    if family == "bert":
        pretrain(load_config("pretrain", config, [f"parallel.zero_stage={zero_stage}"]))
        report = json.loads((run / "report.json").read_text())
    else:
        given = load_config("pretrain", config)
        prepare_directory(tmp_path / "data", given.data, given.new_tokenizer)
        overrides = [f"parallel.zero_stage={zero_stage}", f"data.train={tmp_path}/data", "tokenizer=null"]
        [report] = run_loops(run_case(config, *overrides, workers=2))
    assert report["logits_difference"] < 1e-4
    assert report["tokens"] <= 40 * 4 * 48
    assert "bits_per_byte" not in report
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert [line["step"] for line in lines if "validation_loss" in line] == [20, 40]
    for line in lines:
        assert {"mfu", "data_wait_seconds", "checkpoint_seconds", "memory_bytes"} <= set(line)
    assert 0 < lines[-1]["mfu"] < 1
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForSeq2SeqLM
    model, info = auto.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    if family == "bert":
        ids = torch.tensor([[tokenizer.cls_token_id, *tokenizer("12 apples").input_ids, tokenizer.mask_token_id]])
        assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    else:
        ids = tokenizer("12 app<extra_id_0>and", return_tensors="pt").input_ids
        assert (ids == tokenizer.convert_tokens_to_ids("<extra_id_0>")).sum() == 1
        assert model.generate(ids, max_new_tokens=4)[0, 0] == tokenizer.pad_token_id
    # What reads next tokens refuses it in one line, and training goes on from it with its own objective.
    with pytest.raises(UserError, match=rf"model\.path: .*a {family} model, allowed: a text generator, .*decoder"):
        load_model(run)
    values = yaml.safe_load(config.read_text())
    values |= {"run": {"name": "more", "storage": str(tmp_path)}, "model": {"path": str(run)}}
    evaluated = {key: values[key] for key in ("run", "data", "model")}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(evaluated))
    if family == "t5":
        evaluate(load_config("evaluate", tmp_path / "evaluate.yaml"))
        assert json.loads((tmp_path / "more" / "report.json").read_text())["gap_loss"] > 0
    else:
        with pytest.raises(UserError, match=rf"model\.path: .*a {family} model"):
            evaluate(load_config("evaluate", tmp_path / "evaluate.yaml"))
        assert not (tmp_path / "more").exists()
        del values["tokenizer"]
        values["training"] |= {"steps": 2}
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(values))
        prepare_directory(tmp_path / "data", load_config("pretrain", config).data, TokenizerSection(path=str(run)))
        run_loops(run_case(tmp_path / "more.yaml", f"data.train={tmp_path}/data", stage="finetune"))
        assert read_metrics(tmp_path / "more" / "metrics.jsonl")[0]["loss"] < lines[0]["loss"] - 0.5


def test_a_tokenizer_without_mask_is_refused_before_anything_starts(tmp_path: Path, prepared: Path) -> None:
    config = write_config(tmp_path, "bert", data={"train": str(prepared)}, tokenizer=None)
    with pytest.raises(UserError, match="masked needs a tokenizer with a mask token"):
        pretrain(load_config("pretrain", config))
    assert not (tmp_path / "bert").exists()
