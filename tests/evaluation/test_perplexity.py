"""Windows count every token once; figures agree with a full-context computation and with any number of workers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import RobertaConfig

from raylm.config import load_config
from raylm.data.loading import load_tokenizer
from raylm.errors import RunFailure, UserError
from raylm.evaluation.perplexity import (
    TransformersScorer,
    batch_arrays,
    figures,
    make_stream,
    score_stream,
    window_batches,
)
from raylm.evaluation.stage import BatchScorer, evaluate, score_batches
from raylm.models.loading import load_model
from raylm.reports.report import write_report

TEXTS = ["the quick brown fox jumps over the lazy dog", "中文 and emoji 🙂", "dogs and foxes " * 12]


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(50, 16, 8), (50, 16, 16), (50, 16, 1), (17, 16, 5), (3, 16, 4)]
)
def test_every_token_is_counted_once_with_its_context(count: int, length: int, stride: int) -> None:
    tokens = np.arange(count)
    counted = []
    for batch in window_batches(count, length, stride, batch_size=3):
        inputs, targets = batch_arrays(tokens, batch)
        for row in range(len(batch)):
            places = np.nonzero(targets[row] >= 0)[0]
            counted.extend(targets[row, places])
            assert (targets[row, places] == inputs[row, places] + 1).all()
            if batch[row][0] > 0:
                assert places.min() >= length - stride
    assert counted == list(range(1, count))


def test_same_as_full_context(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    stream = make_stream(TEXTS, tokenizer)
    ids = torch.from_numpy(stream.tokens)[None]
    with torch.inference_mode():
        logits = model(ids[:, :-1]).logits[0].double()
    expected = float(-logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
    found = score_stream(stream, TransformersScorer(model), length=256, stride=128, batch_size=4)
    assert found == pytest.approx(expected, rel=1e-6)
    result = figures(stream, found)
    assert result["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / result["bytes"])
    assert result["perplexity"] == pytest.approx(math.exp(expected / (len(stream.tokens) - 1)))


def write_config(directory: Path, model: Path, name: str, **evaluation) -> Path:
    (directory / "text.txt").write_text("\n".join(TEXTS * 10))
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(directory / "text.txt")},
        "model": {"path": str(model)},
        "evaluation": {"sequence_length": 64, "batch_size": 2, **evaluation},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_same_figure_at_any_number_of_workers(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    reports = []
    for workers in (1, 3):
        path = write_config(tmp_path, tiny_model, f"workers{workers}")
        evaluate(load_config("evaluate", path, [f"resources.workers={workers}"]))
        reports.append(json.loads((tmp_path / f"workers{workers}" / "report.json").read_text()))
    assert [r["workers"] for r in reports] == [1, 3]
    assert reports[0]["cross_entropy"] == reports[1]["cross_entropy"]
    assert "bits per byte" in write_report([tmp_path / "workers3"]).read_text()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.sequence_length=257", "evaluation.sequence_length: found 257, allowed: at most the model's 256"),
        ("evaluation.stride=65", "stride: found 65, allowed: at most sequence_length (64)"),
        ("model.path=./nowhere", "model.path: ./nowhere does not exist"),
        ("data.train=nowhere.txt", "nowhere.txt"),
    ],
)
def test_refused(tiny_model: Path, tmp_path: Path, override: str, expected: str) -> None:
    path = write_config(tmp_path, tiny_model, "refused")
    with pytest.raises(UserError) as caught:
        evaluate(load_config("evaluate", path, [override]))
    assert expected in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_an_encoder_gets_no_random_head(tmp_path: Path) -> None:
    """Also of a family that raylm does not build: transformers would make a next-token model of it."""
    RobertaConfig(architectures=["RobertaForMaskedLM"]).save_pretrained(tmp_path / "model")
    path = write_config(tmp_path, tmp_path / "model", "encoder")
    with pytest.raises(UserError, match=r"model\.path: found .*, an encoder, allowed: a text generator"):
        evaluate(load_config("evaluate", path))
    assert not (tmp_path / "encoder").exists()


@pytest.mark.slow
def test_a_damaged_model_is_named(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.path: .*model\.safetensors is damaged"):
        evaluate(load_config("evaluate", write_config(tmp_path, copy, "damaged")))


@pytest.mark.slow
def test_a_lost_worker_is_a_failure_at_run_time(ray_instance, tiny_model: Path, tmp_path: Path) -> None:
    """A worker that is killed while it scores ends the stage with one line, not with Ray's traceback."""
    import ray

    scorers = [ray.remote(BatchScorer).options(num_cpus=1, max_restarts=0).remote()]
    stream = make_stream(TEXTS * 40, load_tokenizer(tiny_model))
    ray.get(scorers[0].load.remote(str(tiny_model), stream.tokens))
    ray.kill(scorers[0])
    with pytest.raises(RunFailure, match="evaluate: a worker was lost"):
        score_batches(scorers, window_batches(len(stream.tokens), 64, 32, 1))
