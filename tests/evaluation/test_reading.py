"""Readers: windows and places of answers, the search for a span, EM and F1, and the way from encoder to answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoModelForQuestionAnswering

from raylm.config import load_config
from raylm.config.data import DataSection
from raylm.data.loading import load_tokenizer
from raylm.data.samples.questions import evaluation_questions, read_questions
from raylm.data.samples.windows import Windows
from raylm.errors import UserError
from raylm.evaluation.stage import evaluate
from raylm.tasks.extractive_qa.answers import compare, convention_of, units
from raylm.tasks.extractive_qa.spans import best_answer
from raylm.training.reports.metrics import read_metrics
from raylm.training.stage import finetune
from tests.reading import write_encoder, write_questions


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model")


def test_an_answer_is_found_in_every_window_that_holds_it(encoder: Path) -> None:
    context = "Much rain fell on that . " * 8 + "Anna lives in Berlin . " + "Much rain fell . " * 8
    start = context.index("Berlin")
    windows = list(Windows(load_tokenizer(encoder), 40, 10).cut("Where does Anna live?", context))
    assert len(windows) > 2
    holding = 0
    for window in windows:
        first, last = window.find(start, start + len("Berlin"))
        if first == window.null:
            assert last == window.null
            continue
        holding += 1
        assert context[window.offsets[first, 0] : window.offsets[last, 1]] == "Berlin"
    assert holding >= 1
    covered = {i for w in windows for a, b in w.offsets[w.first : w.last + 1] for i in range(a, b)}
    assert covered == {i for i, character in enumerate(context) if not character.isspace()}
    # A question that is too long loses its end, not the context its place.
    long = list(Windows(load_tokenizer(encoder), 40, 10).cut("where does anna live " * 20, context))
    assert all(len(window.input_ids) <= 40 and window.last > window.first for window in long)


def test_the_best_pair_wins_over_the_best_ends(encoder: Path) -> None:
    context = "Anna lives in Berlin . Bert works in Paris ."
    (window,) = Windows(load_tokenizer(encoder), 40, 5).cut("Where?", context)
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.normal(size=(len(window.input_ids), 2)).astype(np.float32) * 3
        found = best_answer(context, [window], [scores], 3, null_threshold=0.0)
        spans = {
            (i, j): float(scores[i, 0]) + float(scores[j, 1])
            for i in range(window.first, window.last + 1)
            for j in range(i, min(i + 3, window.last + 1))
        }
        (first, last), best = max(spans.items(), key=lambda item: item[1])
        null = float(scores[window.null].sum())
        share = np.exp([*spans.values(), null])
        assert found.no_answer == (null > best)
        assert found.score == pytest.approx(np.exp(max(best, null)) / share.sum(), rel=1e-5)
        if not found.no_answer:
            assert (found.start, found.end) == (window.offsets[first, 0], window.offsets[last, 1])
            assert context[found.start : found.end] == found.text


def test_scores_follow_the_scripts_of_squad_and_cmrc() -> None:
    assert compare("The Cat!", ("cat",), "squad") == (1.0, 1.0)
    assert compare("black cat", ("dog", "the black dog"), "squad") == (0.0, pytest.approx(0.5))
    assert compare("", (), "squad") == (1.0, 1.0)
    assert compare("cat", (), "squad") == (0.0, 0.0)
    assert units("在2018年，Beijing大学") == ["在", "2018", "年", "beijing", "大", "学"]
    assert compare("北京大学。", ("北京大学",), "cmrc") == (1.0, 1.0)
    # The longest common run is 大学, two of two and two of four units.
    assert compare("大学", ("北京大学",), "cmrc") == (0.0, pytest.approx(2 * 2 / 6))


def test_questions_are_read_and_mistakes_named(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "q.json", 40, 0, without_answer=True)
    data = DataSection(train=str(path), validation_fraction=0.3)
    sides = list(read_questions(data))
    contexts = [{q.context for s, q in sides if s == side} for side in ("train", "validation")]
    assert all(contexts)
    assert not contexts[0] & contexts[1]
    assert len(evaluation_questions(data)) == len(sides) == 120
    assert sum(not q.answers for _, q in sides) == 40
    assert convention_of([q for _, q in sides]) == "squad"
    content = json.loads(path.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"q\.json: article 0: question 0-0: the answer .* does not stand at character 1"
    ):
        list(read_questions(data))


@pytest.mark.slow
def test_from_encoder_to_answers(ray_instance, encoder: Path, tmp_path: Path) -> None:
    train = write_questions(tmp_path / "train.json", 300, 0, without_answer=True)
    validation = write_questions(tmp_path / "validation.json", 30, 1, without_answer=True)
    values = {
        "run": {"name": "reader", "storage": str(tmp_path)},
        "data": {"train": str(train), "validation": str(validation), "format": "squad"},
        "model": {"path": str(encoder)},
        "objective": {"type": "extractive_qa", "overlap": 16},
        "training": {
            "steps": 80, "batch_size": 32, "sequence_length": 64, "learning_rate": 3e-3, "warmup_steps": 20,
            "evaluate_every_steps": 40,
        },
        "parallel": {"zero_stage": 3},
        "resources": {"workers": 2},
    }  # fmt: skip
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(values))
    finetune(load_config("finetune", path))
    run = tmp_path / "reader"
    assert json.loads((run / "report.json").read_text())["logits_difference"] < 1e-4
    evaluated = [line for line in read_metrics(run / "metrics.jsonl") if "validation_loss" in line]
    assert evaluated[-1]["validation_span_f1"] >= evaluated[-1]["validation_span_exact"] > 0.9
    _, info = AutoModelForQuestionAnswering.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"]
    reading = {"null_threshold": 0.0, "sequence_length": 64, "overlap": 16}
    values = {
        "run": {"name": "evaluation", "storage": str(tmp_path)},
        "data": {"train": str(validation)},
        "model": {"path": str(run)},
        "evaluation": {"reading": reading},
        "resources": {"workers": 1},
    }
    path.write_text(yaml.safe_dump(values))
    evaluate(load_config("evaluate", path))
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert (report["questions"], report["unanswerable_questions"]) == (90, 30)
    assert report["exact_match"] > 90
    assert report["unanswerable_exact_match"] > 80
    # An encoder without a head is no reader.
    values |= {"run": {"name": "other", "storage": str(tmp_path)}, "model": {"path": str(encoder)}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"model\.path"):
        evaluate(load_config("evaluate", path))
    assert not (tmp_path / "other").exists()
