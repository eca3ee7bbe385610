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
from raylm.compression.measuring import agree
from raylm.compression.quality import chosen_windows
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
        "compression": {"prompts": 12, "prompt_tokens": 8, "new_tokens": 8, "text_tokens": 128},
        "evaluation": {"sequence_length": 16, "stride": 16, "batch_size": 2},
    }
    path = tmp_path / "compress.yaml"
    path.write_text(yaml.safe_dump(values))
    compress(load_config("compress", path))
    printed = capsys.readouterr().out
    assert "speed, 8 requests at once, tokens/s" in printed
    assert "Loss over the original's: " in printed
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert after["weight_bytes"] < 0.5 * before["weight_bytes"]
    assert after["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=0.01)
    assert before["bits_per_byte"] > 0
    low, high = after["bits_per_byte_ratio_interval"]
    assert low <= after["bits_per_byte"] / before["bits_per_byte"] <= high < 1.05
    # On the same text, so that how hard it is does not widen it.
    widest = np.ptp(after["bits_per_byte_interval"]) / after["bits_per_byte"]
    assert high - low < 0.2 * widest
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


def test_a_part_of_a_long_text_is_spread_over_it() -> None:
    whole = chosen_windows(10_001, 100, 100, 4, None)
    assert whole == chosen_windows(10_001, 100, 100, 4, 10_001)
    part = chosen_windows(10_001, 100, 100, 4, 2_000)
    assert [batch[0][0] for batch in part] == [0, 2400, 4800, 7200, 9600]
    assert all(batch in whole for batch in part)
    assert len(chosen_windows(10_001, 100, 100, 4, 1)) == 1


def test_rounds_that_differ_are_told() -> None:
    def found(one: float, other: float) -> list[dict[str, object]]:
        return [{"resident_bytes": value, "decode_tokens_per_second": {"1": value}} for value in (one, other)]

    assert agree(found(100, 104)) and not agree(found(100, 106))
    assert agree([{"resident_bytes": 1}, {"resident_bytes": 2}])


def test_missing_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    path = tmp_path / "compress.yaml"
    path.write_text(
        f"run: {{name: x, storage: {tmp_path}}}\ndata: {{train: {tmp_path}/text.txt}}\nmodel: {{path: {tmp_path}/no}}\n"
    )
    with pytest.raises(UserError, match=r"model\.path: .*no does not exist"):
        compress(load_config("compress", path))
    assert not (tmp_path / "x").exists()
