"""int8 through OpenVINO, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylm.compression.exporters.openvino import OpenVINOScorer
from raylm.compression.generators import agreement
from raylm.compression.stage import compress
from raylm.config import load_config
from raylm.errors import UserError
from raylm.models.openvino import has_tokenizer


@pytest.mark.slow
def test_compresses_and_reports(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    values = {
        "run": {"name": "small", "storage": str(tmp_path)},
        "data": {"train": str(tmp_path / "text.txt")},
        "model": {"path": str(tiny_model)},
        "compression": {"prompts": 8, "prompt_tokens": 8, "new_tokens": 8},
        "evaluation": {"sequence_length": 64},
    }
    path = tmp_path / "compress.yaml"
    path.write_text(yaml.safe_dump(values))
    compress(load_config("compress", path))
    assert "speed, 8 requests at once, tokens/s" in capsys.readouterr().out
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert after["weight_bytes"] < 0.5 * before["weight_bytes"]
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=0.01)
    assert before["bits_per_byte"] > 0
    assert all(side["tokens_per_second"][batch] > 0 for side in (before, after) for batch in ("1", "8"))
    assert all(0 < side["resident_bytes"] < side["peak_bytes"] for side in (before, after))
    assert report["logits_cosine"] > 0.99

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small" / "model").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "small" / "model")("the quick brown", return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = model(ids).logits.numpy()
    found = OpenVINOScorer(tmp_path / "small" / "model", threads=1).logits(ids.numpy())
    assert np.abs(found - expected).max() < 0.1
    # What the engine needs to make an answer follow a schema.
    assert has_tokenizer(tmp_path / "small" / "model")
    compress(load_config("compress", path))
    assert "done already" in capsys.readouterr().out


def test_agreement_counts_up_to_the_first_difference() -> None:
    result = agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]])
    assert result == {"tokens_before_first_difference": 4 / 6, "identical_outputs": 0.5}


def test_missing_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    path = tmp_path / "compress.yaml"
    path.write_text(
        f"run: {{name: x, storage: {tmp_path}}}\ndata: {{train: {tmp_path}/text.txt}}\nmodel: {{path: {tmp_path}/no}}\n"
    )
    with pytest.raises(UserError, match=r"model\.path: .*no does not exist"):
        compress(load_config("compress", path))
    assert not (tmp_path / "x").exists()
