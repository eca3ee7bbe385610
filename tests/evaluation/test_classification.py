"""Classifiers: labelled texts, what is wrong with them, and the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raylm.config.data import DataSection
from raylm.data.loading import load_tokenizer
from raylm.data.samples.labelled import LabelledInput, LabelledSamples, LabelledText, evaluation_labelled, in_order
from raylm.errors import UserError
from raylm.tasks.classification.texts import TextSet
from tests.reading import write_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model")


def test_reads_rows_and_numbers(encoder: Path, tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "a.csv", tmp_path / "b.jsonl"
    csv.write_text("text,label\nanna lives,10\nbert works,9\n")
    jsonl.write_text(
        '{"text": "much rain fell", "label": 10}\n{"text": "a baker", "label": 9}\n{"text": " ", "label": 9}\n'
    )
    data = DataSection(train=[str(csv), str(jsonl)])
    assert [(row.text, row.label) for row in evaluation_labelled(data)] == [
        ("anna lives", "10"), ("bert works", "9"), ("much rain fell", "10"), ("a baker", "9"),
    ]  # fmt: skip
    assert in_order({"10", "9"}) == ["9", "10"]
    assert in_order({"b", "10", "9"}) == ["10", "9", "b"]
    assert in_order({"-1", "01", "1", "-10"}) == ["-10", "-1", "01", "1"]
    # Not numbers, though made of digits.
    assert in_order({"--1", "1", "-"}) == ["-", "--1", "1"]
    assert in_order({"1" * 5000, "2"}) == ["1" * 5000, "2"]
    read = LabelledInput(DataSection(train=str(csv), validation=str(jsonl)))
    manifest = read.write(tmp_path / "set", load_tokenizer(encoder), 16)
    assert manifest["labels"] == ["9", "10"]
    batch = LabelledSamples(tmp_path / "set", "validation", 0).batch(np.arange(2))
    assert batch["targets"].tolist() == [[1], [0]]
    assert batch["input_ids"].shape == (2, 8)
    shuffled = LabelledSamples(tmp_path / "set", "train", 0)
    assert sorted(shuffled.batch(np.arange(2))["targets"][:, 0].tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"text": "a"}\n', r"bad\.jsonl:1: no column 'label'; columns found: text"),
        ('{"text": "a", "label": ["x"]}\n', r"bad\.jsonl:1: column 'label': found list, allowed: text"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', r"one label only \('x'\), allowed: two"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n{nonsense\n', r"bad\.jsonl:3: malformed JSON"),
    ],
)
def test_bad_input_is_named(rows: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(rows)
    with pytest.raises(UserError, match=message):
        LabelledInput(DataSection(train=str(path), validation=str(path)))


def test_unknown_labels_are_named(tmp_path: Path) -> None:
    train, other = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("text,label\na,x\nb,y\n")
    other.write_text("text,label\na,x\nb,z\n")
    with pytest.raises(UserError, match=r"b\.csv:3: found the label 'z', allowed: .* training texts have \(x, y\)"):
        LabelledInput(DataSection(train=str(train), validation=str(other)))
    with pytest.raises(UserError, match=r"a\.csv:2: found the label 'x', allowed: .*model\.path was trained with"):
        LabelledInput(DataSection(train=str(train), validation=str(train)), ["y", "z"])


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        # A row of two lines and a row without a text stand before it.
        ("b.csv", 'text,label\n"a\nb",x\n"",y\nc,z\n', r"b\.csv:5: "),
        ("b.jsonl", '{"text": "a", "label": "x"}\n\n{"text": "b", "label": "z"}\n', r"b\.jsonl:3: "),
        ("b.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": "z"}]', r"b\.json: row 2: "),
    ],
)
def test_the_place_of_an_unknown_label_is_named(name: str, content: str, place: str, tmp_path: Path) -> None:
    train, other = tmp_path / "a.csv", tmp_path / name
    train.write_text("text,label\na,x\nb,y\n")
    other.write_text(content)
    with pytest.raises(UserError, match=f"{place}found the label 'z', allowed: those that the training texts have"):
        LabelledInput(DataSection(train=str(train), validation=str(other)))


def test_figures(encoder: Path) -> None:
    texts = [LabelledText(*pair) for pair in [("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")]]
    read = TextSet(texts, ["x", "y", "z"], load_tokenizer(encoder), 8, 2)
    # x, y, y, y: precision of y 2/3, recall 1; of x 1 and 1/2; z stands nowhere and does not count.
    found = read.figures([np.eye(3)[[0, 1]], np.eye(3)[[1, 1]]])
    assert found["accuracy"] == 75.0
    low, high = found["accuracy_interval"]
    assert 0 <= low < 75 < high <= 100
    assert found["macro_f1"] == pytest.approx(100 * (2 / 3 + 0.8) / 2)
    assert set(found["labels"]) == {"x", "y"}
    assert found["confusion"] == {"x": {"x": 1, "y": 1}, "y": {"y": 2}}
    with pytest.raises(UserError, match=r"data: found the label 'y', allowed: the model's own \(x\)"):
        TextSet(texts, ["x"], load_tokenizer(encoder), 8, 2)
