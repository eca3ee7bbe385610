"""What people have, read by every kind of task: running text, conversations, labelled texts and questions."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylm.config.data import DataSection
from raylm.data.samples.labelled import LabelledInput, evaluation_labelled, in_order
from raylm.data.samples.questions import Question, evaluation_questions
from raylm.data.sources.corpus import Corpus
from raylm.data.sources.readers import read_block
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError

TEXTS = ["Ann came.", "猫坐在垫子上。", "Größe: 5 €"]
SQUAD_ROWS = [
    {"id": "a", "title": "t", "context": "Ann came.", "question": "Who?",
     "answers": {"text": ["Ann", "Ann"], "answer_start": [0, 0]}},
    {"id": "b", "title": "t", "context": "猫坐在垫子上。", "question": "在哪？",
     "answers": {"text": [], "answer_start": []}},
]  # fmt: skip
QUESTIONS = [
    Question("a", "Who?", "Ann came.", ("Ann", "Ann"), (0, 0)),
    Question("b", "在哪？", "猫坐在垫子上。", (), ()),
]


def read_texts(data: DataSection) -> list[str]:
    return [document.text for _, document in Corpus(data).documents()]


def read_pairs(data: DataSection) -> list[tuple[str, str, str]]:
    return [(document.prompt, document.answer, document.context) for _, document in Corpus(data).documents()]


def read_labels(data: DataSection) -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in evaluation_labelled(data)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# What each task reads of the same content: (file name, content, read, expected).
def read_turns(data: DataSection) -> list[list[tuple[str, str]]]:
    found = [document for _, document in Corpus(data).documents()]
    return [[(turn["role"], turn["content"]) for turn in document.turns] for document in found]


TALKS = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Ja"}]} for text in TEXTS]
LABELLED = [{"text": text, "label": str(number % 2)} for number, text in enumerate(TEXTS)]
TASKS = {
    "text": ("a.txt", "\n".join(TEXTS) + "\n", read_texts, TEXTS),
    "rows": ("a.jsonl", lines([{"text": text} for text in TEXTS]), read_texts, TEXTS),
    "conversations": ("a.jsonl", lines(TALKS), read_turns, [[("user", text), ("assistant", "Ja")] for text in TEXTS]),
    "labelled": ("a.jsonl", lines(LABELLED), read_labels, [(row["text"], row["label"]) for row in LABELLED]),
    "labelled, csv": (
        "a.csv", "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in LABELLED), read_labels,
        [(row["text"], row["label"]) for row in LABELLED],
    ),
    "questions": ("a.json", json.dumps(SQUAD_ROWS, ensure_ascii=False), evaluation_questions, QUESTIONS),
    "questions by line": ("a.jsonl", lines(SQUAD_ROWS), evaluation_questions, QUESTIONS),
}  # fmt: skip
every_task = pytest.mark.parametrize("task", TASKS)


def section(path: object, **options) -> DataSection:
    return DataSection(**{"train": str(path), "text_unit": "line", **options})


def refusal(read, path: object, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(section(path, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@every_task
@pytest.mark.parametrize(
    ("written", "encoding"),
    [
        ("utf-16", "utf-16"),
        ("utf-16", "detect"),
        ("utf-16-le", "utf-16"),
        ("utf-16-be", "utf-16-be"),
        ("utf-32", "UTF-32"),
        ("utf-32", "detect"),
        ("gb18030", "gb18030"),
        ("utf-8-sig", "utf-8"),
    ],
)
def test_encodings(tmp_path: Path, task: str, written: str, encoding: str) -> None:
    name, content, read, expected = TASKS[task]
    path = tmp_path / name
    path.write_bytes(content.encode(written))
    assert read(section(path, encoding=encoding)) == expected
    if written == "utf-16":
        assert "it begins with the mark of UTF-16: data.encoding: utf-16" in refusal(read, path)


def test_a_long_file_in_utf_16_is_read_whole(tmp_path: Path) -> None:
    # Its blocks would be cut by bytes; in UTF-8 it has more of them.
    path, rows = tmp_path / "a.txt", [f"{number} 猫坐在垫子上" for number in range(150_000)]
    path.write_bytes(("\n".join(rows) + "\n").encode("utf-16"))
    for encoding in ("utf-16", "detect"):
        assert read_texts(section(path, encoding=encoding)) == rows


def test_what_is_no_utf_16_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\ntwo\n".encode("utf-16") + b"\x00\xd8x\x00\n\x00" + "four\n".encode("utf-16-le") + b"x")
    assert refusal(read_texts, path, encoding="utf-16") == f"{path}:3: not UTF-16, allowed: UTF-16 text"
    assert read_texts(section(path, encoding="utf-16", errors="skip")) == ["one", "two", "four"]
    found = read_texts(section(path, encoding="utf-16", errors="replace"))
    assert found == ["one", "two", "\ufffdx", "four", "\ufffd"]
    assert refusal(read_texts, path, encoding="utf-16", text_unit="file").startswith(f"{path}:3: not UTF-16")


@every_task
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda raw: bytes(pa.Codec("zstd").compress(raw))),
    ],
)
def test_damaged_compressed_files(tmp_path: Path, task: str, suffix: str, compress) -> None:
    name, content, read, expected = TASKS[task]
    path = tmp_path / f"{name}{suffix}"
    whole = compress(content.encode())
    path.write_bytes(whole)
    assert read(section(path)) == expected
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        # A file may hold bytes that no check covers; what is wrong is said in a line, whatever data.errors says.
        try:
            read(section(path, errors="skip"))
        except UserError as error:
            refused += str(error).startswith(f"{path}: cannot be read: ") and "write or fetch it again" in str(error)
    # This zstd writes no checksum.
    assert refused > len(whole) * (0.05 if suffix == ".zst" else 0.7)


@every_task
def test_names_with_signs_of_patterns(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, read, expected = TASKS[task]
    for stem in ("what?", "[draft] one", "a[1]", "b*", "#c %20d", "name=e"):
        folder = tmp_path / f"{stem} folder"
        folder.mkdir()
        path = folder / f"{stem}{Path(name).suffix}"
        path.write_text(content, encoding="utf-8")
        compressed = folder / f"z{stem}{Path(name).suffix}.gz"
        compressed.write_bytes(gzip.compress(content.encode()))
        assert read(section(path)) == expected == read(section(compressed)), stem
        assert read(section(folder)) == expected * 2, stem
    monkeypatch.chdir(tmp_path / "what? folder")
    # The file of that very name goes before those that the pattern stands for.
    Path(f"whatx{Path(name).suffix}").write_text("no")
    assert read(section(f"what?{Path(name).suffix}")) == expected
    monkeypatch.chdir(tmp_path)
    assert read(section(f"what[?] folder/what[?]{Path(name).suffix}")) == expected


@every_task
def test_links_to_folders_are_followed(tmp_path: Path, task: str) -> None:
    name, content, read, expected = TASKS[task]
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / name).write_text(content, encoding="utf-8")
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    suffix = Path(name).suffix
    assert read(section(folder)) == expected
    assert read(section(folder / "**" / f"*{suffix}")) == expected
    assert read(section(f"{folder}/*/deep/*{suffix}")) == expected
    assert read(section(f"{folder}/**/deep/**/a.*")) == expected
    (folder / f"gone{suffix}").symlink_to(tmp_path / "nowhere")
    assert refusal(read, folder) == f"{folder}/gone{suffix}: cannot be read: No such file or directory"
    assert refusal(read, folder / f"g*{suffix}").endswith(f"gone{suffix}: cannot be read: No such file or directory")


@pytest.mark.parametrize("task", [task for task, (name, *_) in TASKS.items() if name.startswith("a.json")])
def test_json_nested_deeply(tmp_path: Path, task: str) -> None:
    name, content, read, expected = TASKS[task]
    deep = tmp_path / name
    nested = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    if name.endswith("l"):
        deep.write_text(content + nested + "\n", encoding="utf-8")
        number = content.count("\n") + 1
        assert refusal(read, deep) == f"{deep}:{number}: malformed JSON: nested too deeply; allowed: one object a line"
        assert read(section(deep, errors="skip")) == expected
    else:
        deep.write_text(f"[{nested}]")
        assert refusal(read, deep) == f"{deep}:1: malformed JSON: nested too deeply"


@pytest.mark.parametrize("header", ["text{0}label", '"text"{0}"label"', "id{0}label{0}text", "{0}text{0}label{0}{0}"])
@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_what_parts_the_columns_of_csv(tmp_path: Path, header: str, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    names = header.format(delimiter).split(delimiter)
    rows = [("Well; it's 1,5 | yes\tno", "x"), ('He said "no"', "y")]
    cells = {"text": 0, "label": 1}
    written = [header.format(delimiter)]
    for row in rows:
        quoted = ['"' + value.replace('"', '""') + '"' for value in row]
        written.append(
            delimiter.join(quoted[cells[key]] if (key := name.strip('"')) in cells else "" for name in names)
        )
    path.write_text("\r\n".join(["", *written, ""]))
    for given in (None, delimiter, "tab" if delimiter == "\t" else delimiter):
        assert read_labels(section(path, delimiter=given)) == rows
        assert read_texts(section(path, delimiter=given)) == [text for text, _ in rows]
    assert re.search("columns found: |malformed CSV: ", refusal(read_texts, path, delimiter="_"))
    path.write_text(delimiter.join(("sentence", "class")) + "\n" + delimiter.join(('"a"', '"b"')) + "\n")
    assert "no column 'text' (nor both 'prompt' and 'answer'); columns found: sentence, class" in refusal(
        read_texts, path
    )


def test_delimiters_that_are_none() -> None:
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(ValueError, match="allowed: tab, or one character such as ';'"):
            section("a.csv", delimiter=wrong)


def test_a_comma_stays_one_where_the_header_has_both(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,a;b\none;two,x\n")
    assert read_texts(section(path)) == ["one;two"]


@pytest.mark.parametrize("read", [read_texts, read_labels])
def test_an_unclosed_quote_loses_its_own_row(tmp_path: Path, read) -> None:
    path = tmp_path / "a.csv"
    rows = [f"{number},text {number},{number % 2}\n" for number in range(1, 100)]
    rows[5] = '6,"text 6,0\n'
    path.write_text("id,text,label\n" + "".join(rows))
    message = refusal(read, path)
    assert message.startswith(f"{path}:7: malformed CSV: unexpected end of data")
    assert "(a quote that opens here goes on to line 100; is its end missing?)" in message
    found = read(section(path, errors="skip"))
    assert [row if isinstance(row, str) else row[0] for row in found] == [f"text {n}" for n in range(1, 100) if n != 6]
    # With quoted rows behind it, the next quote is where the file is no CSV any more; a row of three lines stays one.
    rows[49], rows[59], rows[69] = '50,"fifty, and",1\n', '60,"six\n\nty",1\n', '70,"seventy,0\n'
    path.write_text("id,text,label\n" + "".join(rows))
    assert refusal(read, path).startswith(f"{path}:7: malformed CSV: ',' expected after '\"'")
    found = [row if isinstance(row, str) else row[0] for row in read(section(path, errors="skip"))]
    assert found == [
        {50: "fifty, and", 60: "six\n\nty"}.get(n, f"text {n}") for n in range(1, 100) if n not in (6, 70)
    ]  # fmt: skip


def account(path: Path, **options) -> tuple[int, InputErrors, float]:
    """Documents, what was wrong, and the seconds."""
    data = section(path, **options)
    errors, began = InputErrors.of(data), time.monotonic()
    count = sum(1 for block in Corpus(data).blocks for _ in read_block(block, data, errors))
    return count, errors, time.monotonic() - began


def test_every_lost_row_is_counted_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    # Each line, read from its beginning, opens a quote that goes on to the end of the file.
    path.write_text("text,label\n" + 'a","b\n' * 20_000)
    count, errors, seconds = account(path, errors="skip")
    assert count + sum(errors.counts.values()) == 20_000
    assert seconds < 15


def test_malformed_rows_are_skipped_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + ('{"text": "' + "x" * 80 + "\n") * 20_000)
    count, errors, seconds = account(path, errors="skip")
    assert (count, errors.counts) == (1, {"malformed": 20_000})
    assert seconds < 8
    # Numbers are those of the file in every range of it.
    path.write_text('{"text": "good"}\n' * 150_000 + "{\n" + '{"text": "good"}\n' * 10)
    assert len(Corpus(section(path)).blocks) > 1
    assert refusal(read_texts, path).startswith(f"{path}:150001: malformed JSON")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json", ".hub", ".stream"])
def test_rows_without_a_label(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"a{suffix}"
    labels, options = ["x", None, "y", None], {}
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    rows.append({"text": " ", "label": "x"})
    if suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label'] or ''}\n" for row in rows))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix in (".hub", ".stream"):
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
        options = {"format": "hub", "hub_streaming": suffix == ".stream"}
    else:
        path.write_text(lines(rows) if suffix == ".jsonl" else json.dumps(rows))
    place = {".jsonl": ":2", ".csv": ":3"}.get(suffix, ": row 2")
    assert refusal(read_labels, path, **options) == (
        f"{path}{place}: column 'label': found no label, allowed: one in every row; data.errors: skip leaves such rows "
        "out and counts them"
    )
    capsys.readouterr()
    assert read_labels(section(path, errors="skip", **options)) == [("text 0", "x"), ("text 2", "y")]
    said = capsys.readouterr().err
    assert said.startswith("data.train: left out or mended: 2 without a label, 1 without a text (data.errors: skip); ")
    assert f"the first: {path}{place}: column 'label'" in said


def test_labels_that_pandas_wrote_as_missing_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, float("nan")]}), path)
    assert "row 2: column 'label': found no label" in refusal(read_labels, path)
    assert in_order({"--1", "2", "10"}) == ["--1", "10", "2"]
    assert in_order({"-1", "2", "10", "02"}) == ["-1", "02", "2", "10"]


def test_skipped_questions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    wrong = [
        {**SQUAD_ROWS[0], "answers": {"text": ["Ann"], "answer_start": [4]}},
        {**SQUAD_ROWS[0], "answers": {"text": ["Ann"], "answer_start": []}},
        {**SQUAD_ROWS[0], "answers": {"text": ["Ann"], "answer_start": [0, 4]}},
        {**SQUAD_ROWS[0], "answers": "Ann"},
        {**SQUAD_ROWS[0], "question": None},
    ]
    path.write_text(lines([*SQUAD_ROWS, *wrong]), encoding="utf-8")
    assert refusal(evaluation_questions, path) == (
        f"{path}:3: question a: the answer 'Ann' does not stand at character 4 of the context (found 'cam')"
    )
    capsys.readouterr()
    expected = [*QUESTIONS, Question("a", "Who?", "Ann came.", ("Ann",), (0,))]
    assert evaluation_questions(section(path, errors="skip")) == expected
    assert "left out or mended: 1 misplaced, 3 malformed (data.errors: skip)" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["json", "squad", "jsonl", "parquet", "hub", "hub, streaming"])
def test_questions_as_datasets_has_them(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    options = {}
    if form in ("json", "squad"):
        path.write_text(json.dumps({"data": SQUAD_ROWS} if form == "squad" else SQUAD_ROWS), encoding="utf-8")
        options = {"format": form}
    elif form == "jsonl":
        path.write_text(lines(SQUAD_ROWS), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(SQUAD_ROWS), path)
    else:
        import datasets

        path = tmp_path / "saved"
        datasets.Dataset.from_list(SQUAD_ROWS).save_to_disk(str(path))
        options = {"format": "hub", "hub_streaming": form.endswith("streaming")}
    assert evaluation_questions(section(path, **options)) == QUESTIONS
    # For a generating model they are pairs; those without an answer are empty.
    assert read_pairs(section(path, **options)) == [("Who?", "Ann", "")]
    assert read_pairs(section(path, fields={"context": "context"}, **options)) == [("Who?", "Ann", "Ann came.")]


PARTS = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
CHATS = [
    {"messages": [
        {"role": "user", "content": PARTS}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]},
    {"messages": [
        {"role": "user", "content": "Time?"}, {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "12:30"}, {"role": "assistant", "content": "Half past twelve"},
    ]},
]  # fmt: skip
CHAT_TURNS = [
    [("user", "Look\nhere"), ("assistant", "A")],
    [("user", "Time?"), ("assistant", ""), ("tool", "12:30"), ("assistant", "Half past twelve")],
]


@pytest.mark.parametrize("form", ["jsonl", "json", "hub", "hub, streaming"])
def test_conversations_of_parts_and_calls(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    options = {}
    if form.startswith("hub"):
        path = tmp_path / "folder"
        path.mkdir()
        # datasets reads a column of one type only.
        rows = CHATS[1:]
        (path / "train.jsonl").write_text(lines(rows))
        options = {"format": "hub", "hub_streaming": form.endswith("streaming")}
    else:
        path.write_text(lines(CHATS) if form == "jsonl" else json.dumps(CHATS))
    assert read_turns(section(path, **options)) == (CHAT_TURNS[1:] if options else CHAT_TURNS)


def test_parts_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    image = {"type": "image_url", "image_url": {"url": "x"}}
    path.write_text(lines([*CHATS, {"messages": [{"role": "user", "content": [*PARTS, image]}]}]))
    assert refusal(read_turns, path) == (
        f"{path}:3: column 'messages': a message has a part of type image_url, allowed: text"
    )
    assert read_turns(section(path, errors="skip")) == CHAT_TURNS
    path.write_text('{"messages": [{"role": "user", "content": 3}]}\n')
    assert refusal(read_turns, path) == f"{path}:1: column 'messages': found a content of int, allowed: text"
    path.write_text('{"messages": [{"role": "user"}]}\n')
    assert "a message without role and content" in refusal(read_turns, path)


def test_lists_of_rows_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(LABELLED))
    assert read_texts(section(path)) == TEXTS
    assert read_labels(section(path)) == [(row["text"], row["label"]) for row in LABELLED]
    path.write_text(json.dumps([{"prompt": "Q", "answer": "A"}]))
    assert read_pairs(section(path)) == [("Q", "A", "")]
    path.write_text(json.dumps([{"text": "a"}, 3, {"text": "b"}]))
    assert refusal(read_texts, path) == f"{path}: row 2: found a JSON int, allowed: objects"
    assert read_texts(section(path, errors="skip")) == ["a", "b"]
    path.write_text(lines(LABELLED))
    assert refusal(read_texts, path) == (
        f"{path}:2: malformed JSON: Extra data; one object a line is data.format: jsonl"
    )
    assert read_texts(section(path, format="jsonl")) == TEXTS
    path.write_text('{"text": "a"}')
    assert "found no list 'data'; allowed: SQuAD, a list of rows, or one object a line" in refusal(read_texts, path)
    path.write_text(json.dumps(LABELLED))
    assert "found the columns text, label, allowed: those of SQuAD" in refusal(evaluation_questions, path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep").chmod(0)
    try:
        assert refusal(read_texts, tmp_path) == f"{tmp_path}/deep: cannot be read: Permission denied"
    finally:
        (tmp_path / "deep").chmod(0o700)


def test_random_csv_never_raises_anything_else(tmp_path: Path) -> None:
    path, draw = tmp_path / "a.csv", random.Random(0)
    for _ in range(300):
        body = "".join(draw.choices('ab",;\n\r" ', k=draw.randint(0, 200)))
        path.write_bytes(f"text,label\n{body}".encode())
        for errors in ("strict", "skip"):
            try:
                read_labels(section(path, errors=errors))
            except UserError as error:
                assert str(path) in str(error) or "found no text with a label" in str(error)


def test_labelled_input_still_needs_two_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text;label\na;x\nb;\n")
    with pytest.raises(UserError, match=r"a\.csv:3: column 'label': found no label"):
        LabelledInput(section(path, validation=str(path)))
    with pytest.raises(UserError, match="found one label only"):
        LabelledInput(section(path, validation=str(path), errors="skip"))
