"""Encoder-decoders for pairs through compress: from the file to an 8-bit export that writes as its model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from raylm.compression import measuring
from raylm.compression.material import Material
from raylm.compression.stage import compress
from raylm.config import load_config
from raylm.data.loading import load_tokenizer
from raylm.errors import UserError
from raylm.models.encoder_decoders import pairs_note
from raylm.tasks import find_task, task_of
from tests.pairs import write_model, write_pairs
from tests.training.loops import run_case, run_loops


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 400)


def write_config(directory: Path, files: tuple[Path, Path], model: Path, **values: object) -> Path:
    given = {
        "run": {"name": "small", "storage": str(directory)},
        "data": {"train": [{"path": str(files[0]), "target": str(files[1])}], "validation_fraction": 0.2},
        "model": {"path": str(model)},
        "evaluation": {"new_tokens": 12},
        "resources": {"workers": 1},
    }
    path = directory / "compress.yaml"
    path.write_text(yaml.safe_dump(given | values))
    return path


def test_what_is_written_is_in_the_vocabulary_too(files: tuple[Path, Path], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", *files, **pairs_note(""))
    few = {"compression": {"text_tokens": 10}}
    config = load_config("compress", write_config(tmp_path, files, model, **few))
    used = Material(config, find_task("sequence_to_sequence"), str(model)).used_tokens()
    tokenizer = load_tokenizer(model)
    texts = [*files[0].read_text().splitlines(), *files[1].read_text().splitlines()]
    expected = {token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]}
    assert expected <= set(used)


def test_beams_are_for_evaluate(files: tuple[Path, Path], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", *files, **pairs_note(""))
    path = write_config(tmp_path, files, model, evaluation={"beams": 4})
    with pytest.raises(UserError, match=r"^evaluation\.beams: found 4, allowed in compress: 1"):
        compress(load_config("compress", path))
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_from_pairs_to_an_export(
    ray_instance, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    model = write_model(tmp_path / "begun", *files)
    training = {"steps": 150, "batch_size": 16, "sequence_length": 16, "learning_rate": 0.01, "log_every_steps": 50}
    objective = {"type": "sequence_to_sequence", "source_prefix": "say: "}
    path = write_config(tmp_path, files, model, training=training, objective=objective)
    values = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "evaluation"}
    values["run"]["name"] = "trained"
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(values))
    run_loops(run_case(tmp_path / "finetune.yaml", stage="finetune"))
    trained = tmp_path / "trained" / "model"

    few = {"steps": 60, "batch_size": 16, "sequence_length": 16, "learning_rate": 5e-3}
    steps = [
        {"prune": {"neurons": 64, "samples": 8, "sequence_length": 16, "recovery": {"training": few}}},
        {"prune": {"vocabulary": "used"}},
        {"quantize": {"bits": 8}},
    ]
    compression = {"steps": steps, "prompts": 4, "prompt_tokens": 4, "new_tokens": 8}
    compress(load_config("compress", write_config(tmp_path, files, trained, compression=compression)))
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert report["task"] == "sequence_to_sequence"
    # The words are learnt, their order is not yet.
    assert before["rouge1"] > 40
    assert after["rouge1"] > 0.5 * before["rouge1"]
    assert all(0 < side[key] <= 100 for side in (before, after) for key in ("bleu", "chrf", "rouge1", "rouge_l"))
    assert after["weight_bytes"] < 0.6 * before["weight_bytes"]
    assert report["losses_correlation"] > 0.95 and report["same_texts"] > 0.3
    assert "BLEU" in shown and "of the sources" in shown
    assert all(after["tokens_per_second"][batch] > 0 for batch in ("1", "8"))
    assert task_of(AutoConfig.from_pretrained(tmp_path / "small" / "model")).name == "sequence_to_sequence"
