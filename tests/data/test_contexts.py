"""The passages of SQuAD files as plain documents, once each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raylm.config.data import DataSection
from raylm.data.sources.corpus import Corpus

CONTEXTS = ["The sky is blue.", "天空是蓝色的。", "Grass is green."]


def asked(number: int) -> list[dict]:
    word = CONTEXTS[number][:3]
    return [
        {"id": f"{number}-{one}", "question": f"Question {one}?", "answers": [{"text": word, "answer_start": 0}]}
        for one in range(3)
    ]


def articles() -> dict:
    paragraphs = [{"context": text, "qas": asked(number)} for number, text in enumerate(CONTEXTS)]
    return {"version": "1", "data": [{"paragraphs": paragraphs[:2]}, {"paragraphs": paragraphs[2:]}]}


def rows() -> list[dict]:
    return [
        {**question, "context": text, "answers": {"text": [text[:3]], "answer_start": [0]}}
        for number, text in enumerate(CONTEXTS)
        for question in asked(number)
    ]


@pytest.mark.parametrize("form", ["articles", "rows", "lines"])
def test_each_context_is_a_document_once(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("questions.jsonl" if form == "lines" else "questions.json")
    lines = "".join(json.dumps(row) + "\n" for row in rows())
    path.write_text(lines if form == "lines" else json.dumps(articles() if form == "articles" else rows()))
    data = DataSection(train=str(path), validation_fraction=0, fields={"text": "context"})
    found = [document for _, document in Corpus(data).documents()]
    assert [document.text for document in found] == CONTEXTS
    assert not any(document.prompt or document.answer or document.context for document in found)
    # As pairs, all nine questions.
    pairs = [document for _, document in Corpus(data.model_copy(update={"fields": type(data.fields)()})).documents()]
    assert len(pairs) == 9 and all(document.prompt for document in pairs)
