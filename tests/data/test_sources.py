from __future__ import annotations

from pathlib import Path

import pytest

from raylm.config.data import DataSection
from raylm.data.sources.corpus import Corpus
from raylm.errors import UserError


def texts(train, **options) -> list[str]:
    return [document.text for _, document in Corpus(DataSection(train=train, **options)).documents()]


def refusal(train, **options) -> str:
    with pytest.raises(UserError) as caught:
        Corpus(DataSection(train=train, **options)).survey()
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "sea"}\n')
    (tmp_path / "deep" / "notes.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    return tmp_path


def test_directories_globs_and_lists(folder, monkeypatch):
    assert texts(str(folder)) == ["ay", "bee", "sea"]
    assert texts(str(folder), format="text") == ["ay", "bee"]
    assert texts(str(folder / "*.txt")) == ["bee"]
    assert texts(str(folder / "**" / "*.jsonl")) == ["sea"]
    assert texts([str(folder / "deep"), str(folder / "b.txt")]) == ["sea", "bee"]
    monkeypatch.chdir(folder)
    assert texts("*.md") == ["ay"]
    assert texts("deep/../?.txt") == ["bee"]
    # A format that is given goes before the suffix.
    assert texts("deep/c.jsonl", format="text") == ['{"text": "sea"}\n']


def test_what_is_not_there_is_refused(folder):
    assert refusal(str(folder / "no.txt")) == f"data.train: {folder}/no.txt does not exist"
    assert refusal(str(folder / "*.csv")) == f"data.train: no file matches '{folder}/*.csv'"
    assert "unknown suffix '.bin', allowed: .txt" in refusal(str(folder / "deep" / "notes.bin"))
    assert "holds no file of format csv" in refusal(str(folder), format="csv")
    assert refusal(str(folder), validation="gone.txt").startswith("data.validation: gone.txt does not exist")
    assert "is not a prepared directory" in refusal(str(folder), format="prepared")
    assert refusal("some-name") == "data.train: some-name does not exist; a hub name needs data.format=hub"


def test_empty_input_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\t\n")
    (tmp_path / "b.jsonl").write_text("")
    assert refusal(str(tmp_path / "a.txt")).endswith("a.txt: no document that is not empty (1 empty ones)")
    assert refusal(str(tmp_path / "b.jsonl")).endswith("b.jsonl: no document that is not empty")
    (tmp_path / "c.txt").write_text("a single document")
    message = refusal(str(tmp_path / "c.txt"))
    assert message.startswith("data.validation_fraction: 0.05 of 1 documents leaves none for validation; allowed: ")
    assert Corpus(DataSection(train=str(tmp_path / "c.txt"), validation_fraction=0.0)).survey().documents == {
        "train": 1,
        "validation": 0,
    }


def test_kinds_are_not_mixed(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"prompt": "Q", "answer": "A"}\n')
    message = refusal([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert message.startswith("data: found pairs in ") and message.endswith("a.txt; allowed: one kind")


def test_a_validation_source_takes_the_place_of_the_split(folder):
    data = DataSection(train=str(folder / "b.txt"), validation=str(folder / "a.md"), validation_fraction=0.9)
    assert [(split, document.text) for split, document in Corpus(data).documents()] == [
        ("train", "bee"),
        ("validation", "ay"),
    ]


def test_prepared_documents_stay_on_their_side(prepared_documents):
    def sides(**options):
        return [split for split, _ in Corpus(DataSection(train=str(prepared_documents), **options)).documents()]

    both = sides(validation_fraction=0.0)
    assert both.count("validation") > 30 and both.count("train") > 200
    # With a validation source of its own, the held-out documents are not trained on.
    apart = sides(validation=str(prepared_documents))
    assert apart == both
    survey = Corpus(DataSection(train=str(prepared_documents))).survey()
    assert survey.documents == {"train": both.count("train"), "validation": both.count("validation")}


def test_hub_datasets_on_disk(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"body": ["one", "two 猫", ""]})
    rows.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(str(tmp_path / "several"))
    options = {"format": "hub", "fields": {"text": "body"}}
    assert texts(str(tmp_path / "single"), **options) == ["one", "two 猫"]
    assert texts(str(tmp_path / "several"), hub_split="dev", **options) == ["two 猫"]
    message = refusal(str(tmp_path / "several"), hub_split="test", **options)
    assert message.startswith("data.hub_split: found 'test', allowed for ") and message.endswith("train, dev")
    assert "columns found: body" in refusal(str(tmp_path / "single"), format="hub")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"prompt": "Q", "answer": "A"}\n')
    assert texts(str(tmp_path / "files"), format="hub") == ["Q\nA"]
    (tmp_path / "parquet").mkdir()
    for part in range(3):
        rows = datasets.Dataset.from_dict({"body": [f"{part} {number}" for number in range(40)]})
        rows.to_parquet(str(tmp_path / "parquet" / f"train-{part}.parquet"))
    wanted = [f"{part} {number}" for part in range(3) for number in range(40)]
    assert texts(str(tmp_path / "parquet"), **options) == wanted
    # Of a streamed one each file is read by itself.
    streamed = DataSection(train=str(tmp_path / "parquet"), hub_streaming=True, **options)
    assert len(Corpus(streamed).blocks) == 3
    assert texts(str(tmp_path / "parquet"), hub_streaming=True, **options) == wanted
    assert texts(str(tmp_path / "single"), hub_streaming=True, **options) == ["one", "two 猫"]
    assert "cannot be loaded by datasets" in refusal(str(tmp_path / "nowhere"), format="hub")
