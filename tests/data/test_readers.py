from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.config.data import DataSection
from raylm.data.sources.corpus import Corpus
from raylm.errors import UserError


def texts(path, **options) -> list[str]:
    return [document.text for _, document in Corpus(DataSection(train=str(path), **options)).documents()]


def pairs(path, **options) -> list[tuple[str, str, str]]:
    section = DataSection(train=str(path), **options)
    return [(d.prompt, d.answer, d.context) for _, d in Corpus(section).documents()]


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        Corpus(DataSection(train=str(path), **options)).survey()
    return str(caught.value)


def test_text_by_file_paragraph_and_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone 猫\r\ntwo\n\n \nthree\n".encode())
    assert texts(path) == ["one 猫\r\ntwo\n\n \nthree\n"]
    assert texts(path, text_unit="paragraph") == ["one 猫\r\ntwo", "three"]
    assert texts(path, text_unit="line") == ["one 猫", "two", "three"]


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_undecodable_bytes_are_named_by_offset(tmp_path, unit, mark):
    path = tmp_path / "a.txt"
    content = mark + "first 猫\nsecond ".encode()
    path.write_bytes(content + b"\xff\xfe\nrest")
    # The offset is that of the file, byte order mark included.
    expected = f"{path}: not UTF-8 at byte {len(content)}: found 0xff, allowed: UTF-8 text"
    assert refusal(path, text_unit=unit) == expected


def test_jsonl_documents_and_pairs(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": null, "other": 1}\n{"text": "two"}\n')
    assert texts(path) == ["one", "two"]
    path.write_text(
        '{"q": "Q1", "a": "A1", "c": "C"}\n{"q": "Q2", "a": "A2", "c": null}\n{"q": "Q3", "a": " ", "c": ""}\n'
    )
    fields = {"prompt": "q", "answer": "a", "context": "c"}
    assert pairs(path, fields=fields) == [("Q1", "A1", "C"), ("Q2", "A2", "")]
    path.write_text('{"prompt": "Q", "answer": "A", "text": "T"}\n')
    assert pairs(path) == [("Q", "A", "")]
    assert texts(path, fields={"text": "text"}) == ["T"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', ":2: malformed JSON: Expecting ',' delimiter; allowed: one object a line"),
        ('["x"]', ":2: found a JSON list, allowed: one object a line"),
        ('{"body": "x"}', ":2: no column 'text'; columns found: body"),
        ('{"text": 3}', ":2: column 'text': found int, allowed: text"),
        ('{"text": "\\ud800"}', ":2: column 'text': not valid Unicode at character 0"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    assert refusal(path) == f"{path}{message}"


def test_csv_and_tsv(tmp_path):
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_text(f'id,text\n1,"two\nlines, and ""quotes"""\n2,{long}\n')
    assert texts(path) == ['two\nlines, and "quotes"', long]
    path = tmp_path / "a.tsv"
    path.write_text("prompt\tanswer\nQ, really?\tA\n")
    assert pairs(path) == [("Q, really?", "A", "")]


def test_bad_csv_is_named_by_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n2,b,c\n")
    assert refusal(path) == f"{path}:3: found 3 fields, the header has 2"
    path.write_text("text,text\na,b\n")
    assert refusal(path) == f"{path}:1: column 'text' is twice in the header"
    path.write_text('id,text\n1,"a" b\n')
    assert refusal(path).startswith(f"{path}:2: malformed CSV: ")
    path.write_text("id,body\n1,a\n")
    assert refusal(path) == (
        f"{path}: no column 'text' (nor both 'prompt' and 'answer'); columns found: id, body; name yours in data.fields"
    )


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", None, "猫"], "other": [1, 2, 3]}), path)
    assert texts(path, fields={"text": "body"}) == ["one", "猫"]
    assert "columns found: body, other" in refusal(path)
    assert refusal(path, fields={"text": "other"}) == f"{path}: row 1: column 'other': found int, allowed: text"
    path.write_bytes(b"not parquet at all")
    assert refusal(path).startswith(f"{path}: not a readable Parquet file: ")
