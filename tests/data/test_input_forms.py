"""Compressed and remote files, mixtures, conversations, SQuAD and parallel text, and what is done with bad input."""

from __future__ import annotations

import bz2
import functools
import gzip
import http.server
import json
import lzma
import random
import socket
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSystem

from raylm.config.data import DataSection
from raylm.data.sources.blocks import Block
from raylm.data.sources.corpus import Corpus
from raylm.data.sources.documents import Document, split_of
from raylm.data.sources.readers import read_block
from raylm.data.sources.streams import InputErrors
from raylm.errors import UserError

LINES = "one\ntwo 猫\nthree\n"


def documents(train, **options) -> list[Document]:
    return [document for _, document in Corpus(DataSection(train=train, **options)).documents()]


def texts(train, **options) -> list[str]:
    return [document.text for document in documents(train, text_unit="line", **options)]


def refusal(train, **options) -> str:
    with pytest.raises(UserError) as caught:
        Corpus(DataSection(train=str(train), **options)).survey()
    return str(caught.value)


def account(path, **options) -> tuple[list[str], InputErrors]:
    """Texts, and the count of what was wrong."""
    data = DataSection(train=str(path), **options)
    errors, corpus = InputErrors(data.errors), Corpus(data)
    found = [d.text for block in corpus.blocks for d in read_block(Block.from_json(block.to_json()), data, errors)]
    return found, errors


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda raw: b"".join(bytes(pa.Codec("zstd").compress(part)) for part in (raw[:5], raw[5:]))),
    ],
)
def test_compressed_files(tmp_path, suffix, compress):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(LINES.encode()))
    assert texts(str(path)) == ["one", "two 猫", "three"]
    rows = tmp_path / f"b.jsonl{suffix}"
    rows.write_bytes(compress(b'{"text": "x"}\n{"text": \n'))
    assert refusal(rows).startswith(f"{rows}:2: malformed JSON")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 6])
    assert f"{path}: cannot be read: " in refusal(path, text_unit="line")


def test_remote_files(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert texts(f"{address}/a.txt") == ["one", "two 猫", "three"]
        assert "/none.txt" in refusal(f"{address}/none.txt")
        # A query is no pattern, and a file of that very name goes before a pattern.
        assert texts(f"{address}/a.txt?download=1") == ["one", "two 猫", "three"]
        (tmp_path / "a[1] b.txt").write_text("four\n")
        assert texts(f"{address}/a[1] b.txt") == ["four"]
    finally:
        server.shutdown()
        server.server_close()
    assert refusal(f"{address}/a.txt").startswith(f"data.train: {address}/a.txt")
    assert refusal("nowhere://x/a.txt").startswith("nowhere://x/a.txt: ")


def test_s3(bucket, tmp_path):
    address, _, query = bucket.partition("?")
    address, query = f"{address}/corpus", f"?{query}"
    files, folder = FileSystem.from_uri(f"{address}{query}")
    files.create_dir(folder)

    def put(name: str, content: bytes) -> None:
        with files.open_output_stream(f"{folder}/{name}", compression=None) as stream:
            stream.write(content)

    put("a.txt", LINES.encode())
    put("deep/b.jsonl.gz", gzip.compress(b'{"text": "four"}\n{"text": "five"}\n'))
    draw = random.Random(0)
    rows = [f"{number} {draw.randbytes(500).hex()}" for number in range(3000)]
    pq.write_table(pa.table({"text": rows, "other": rows}), tmp_path / "c.parquet", row_group_size=1000)
    put("c.parquet", (tmp_path / "c.parquet").read_bytes())
    assert texts(f"{address}/a.txt{query}") == ["one", "two 猫", "three"]
    assert texts(f"{address}/*.txt{query}") == ["one", "two 猫", "three"]
    assert texts(f"{address}/*/*.gz{query}") == ["four", "five"]
    # A directory has all that is below it; of a large Parquet file each row group is read by itself.
    corpus = Corpus(DataSection(train=f"{address}{query}", text_unit="line"))
    assert [segment.stop for segment in corpus.sources[0].segments] == [len(LINES.encode()), 1, 2, 3, None]
    assert [d.text for _, d in corpus.documents()] == ["one", "two 猫", "three", *rows, "four", "five"]
    assert refusal(f"{address}/none.txt{query}").endswith("no file there")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"s3://bucket/a.txt?scheme=http&endpoint_override=127.0.0.1%3A{free.getsockname()[1]}&region=us-east-1"
        assert f"data.train: {nobody} cannot be reached: " in refusal(nobody)


def test_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    talk = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "So long")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in talk]},
        {"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [[(turn["role"], turn["content"]) for turn in d.turns] for d in documents(str(path))] == [
        talk,
        [("user", "Q"), ("assistant", "A")],
    ]
    path.write_text('{"messages": [{"role": "user"}]}\n')
    assert refusal(path).startswith(f"{path}:1: column 'messages': a message without role and content")
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], {"messages": rows[0]["messages"][:4]}]))
    assert refusal(path) == (
        f"{path}:2: column 'messages': the conversation ends with a message of 'user', allowed: of the assistant"
    )


def test_forms_of_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    forms = {
        "alpaca": {"instruction": "Add", "input": "1, 2", "output": "3", "system": "Be brief.",
                   "history": [["a", "b"]]},
        "sharegpt": {"conversations": [{"from": "human", "value": "Add"}, {"from": "gpt", "value": "3"}],
                     "system": "Be brief.", "tools": json.dumps(tools)},
        "openai": {"messages": [{"role": "user", "content": "Add"},
                                {"role": "assistant", "content": "3", "weight": 0}], "tools": tools},
    }  # fmt: skip
    system = ("system", "Be brief.")
    expected = {
        "alpaca": [system, ("user", "a"), ("assistant", "b"), ("user", "Add\n\n1, 2"), ("assistant", "3")],
        "sharegpt": [system, ("user", "Add"), ("assistant", "3")],
        "openai": [("user", "Add"), ("assistant", "3")],
    }
    for form, row in forms.items():
        path.write_text(json.dumps(row) + "\n")
        (found,) = documents(str(path), fields={"preset": form})
        assert [(turn["role"], turn["content"]) for turn in found.turns] == expected[form]
        assert json.loads(found.tools or "[]") == ([] if form == "alpaca" else tools)
    assert found.turns[1]["weight"] == 0
    assert refusal(path, fields={"preset": "alpaca"}) == (
        f"{path}: no columns of the form alpaca (instruction, output); columns found: messages, tools"
    )


def test_conversations_with_one_system_message_are_split(tmp_path):
    """What many begin with decides nothing."""
    path = tmp_path / "a.jsonl"
    talks = [[("system", "Be kind."), ("user", f"Hi {n}"), ("assistant", "Yes")] for n in range(200)]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in talks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = [split_of(document, 0.2) for document in documents(str(path))]
    assert 20 <= sides.count("validation") <= 60


def test_squad_and_parallel_text(tmp_path):
    squad = tmp_path / "a.json"
    questions = [
        {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]},
        {"question": "What?", "answers": []},
    ]
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ann came.", "qas": questions}]}]}))
    assert [(d.prompt, d.answer, d.context) for d in documents(str(squad))] == [("Who?", "Ann", "")]
    fields = {"context": "context"}
    assert [d.context for d in documents(str(squad), fields=fields)] == ["Ann came."]
    flat = [{"context_text": "甲来了。", "qas": [{"query_text": "谁？", "answers": ["甲"]}]}]
    squad.write_text(json.dumps(flat, ensure_ascii=False))
    assert [(d.prompt, d.answer) for d in documents(str(squad))] == [("谁？", "甲")]
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.zh").write_text("一\n二\n")
    source = {"path": str(tmp_path / "a.en"), "target": str(tmp_path / "a.zh"), "format": "text"}
    assert [(d.prompt, d.answer) for d in documents([source])] == [("one", "一"), ("two", "二")]
    for side in ("a.en", "a.zh"):
        (tmp_path / side).write_bytes((tmp_path / side).read_text().encode("utf-16"))
    found = documents([source], encoding="utf-16")
    assert [(d.prompt, d.answer) for d in found] == [("one", "一"), ("two", "二")]
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.zh").write_text("一\n")
    with pytest.raises(UserError, match=r"a\.zh: ends after line 1"):
        documents([source])


def test_two_columns_are_pairs(tmp_path):
    path = tmp_path / "en-fr.txt"
    path.write_text("Go.\tVa !\tCC-BY (a & b)\n\nRun!\tCours !\n", encoding="utf-8")
    found = documents(str(path), format="parallel")
    assert [(pair.prompt, pair.answer) for pair in found] == [("Go.", "Va !"), ("Run!", "Cours !")]
    # Cut into ranges, every line is read once.
    path.write_text("".join(f"line {n}\tligne {n}\n" for n in range(150_000)), encoding="utf-8")
    corpus = Corpus(DataSection(train=str(path), format="parallel"))
    assert len(corpus.blocks) > 1
    assert [pair.prompt for _, pair in corpus.documents()] == [f"line {n}" for n in range(150_000)]
    path.write_bytes("Go.\tVa !\nRun!\tCours !\n".encode("utf-16"))
    found = documents(str(path), format="parallel", encoding="utf-16")
    assert [(pair.prompt, pair.answer) for pair in found] == [("Go.", "Va !"), ("Run!", "Cours !")]
    path.write_text("Go.\tVa !\nRun!\n")
    assert f"{path}:2: found no tab, allowed: a text, a tab and its translation" in refusal(path, format="parallel")
    assert account(path, format="parallel", errors="skip")[1].counts == {"malformed": 1}


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "detect"])
def test_encodings_by_name_or_guessed(tmp_path, encoding):
    poem = "床前明月光，\n疑是地上霜。\n舉頭望明月，\n低頭思故鄉。\n" if encoding == "big5" else (
        "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n我们常说，读书破万卷，下笔如有神。\n"
    )  # fmt: skip
    path, rows = tmp_path / "poem.txt", tmp_path / "poem.jsonl"
    written = "gb18030" if encoding == "detect" else encoding
    path.write_bytes(poem.encode(written))
    rows.write_bytes(
        "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in poem.split()).encode(written)
    )
    assert texts(str(path), encoding=encoding) == poem.split() == texts(str(rows), encoding=encoding)
    if encoding == "detect":
        path.write_text("naïve, 猫\n", encoding="utf-8")
        assert texts(str(path), encoding=encoding) == ["naïve, 猫"]
    else:
        path.write_bytes("床".encode(written) + b"\xff\n")
        assert f"{path}: not {encoding.upper()} at byte 2: found 0xff" in refusal(path, encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-7", "nonsense", "base64", "cp037"])
def test_encodings_that_cannot_be_read_by_lines_are_refused(encoding):
    with pytest.raises(ValueError, match="an encoding of Python in which a line feed is one byte, such as utf-8"):
        DataSection(train="x", encoding=encoding)


def test_mixed_encodings_are_refused_replaced_or_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\ncaf\xe9 noir\nfine\n\x00\x00\x00\n")
    assert refusal(path, text_unit="line") == f"{path}: not UTF-8 at byte 8: found 0xe9, allowed: UTF-8 text"
    found, errors = account(path, text_unit="line", errors="replace")
    assert found == ["good", "caf\ufffd noir", "fine", "\ufffd\ufffd\ufffd"] and errors.counts == {"undecodable": 2}
    found, errors = account(path, text_unit="line", errors="skip")
    assert found == ["good", "fine"] and errors.counts == {"undecodable": 2}
    assert errors.samples[0].endswith("at byte 8: found 0xe9, allowed: UTF-8 text")
    path.write_bytes(bytes(5000))
    assert refusal(path) == f"{path}: not UTF-8 at byte 0: found 0x00, allowed: UTF-8 text"


def test_bad_rows_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n[1]\n{"text": 3}\n{"text": "fine"}\n')
    found, errors = account(path, errors="skip")
    assert found == ["good", "fine"] and errors.counts == {"malformed": 3}
    assert [sample.split(": ")[0] for sample in errors.samples] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert refusal(path, errors="replace").startswith(f"{path}:2: malformed JSON")
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n2,b,c\n3,d\n")
    found, errors = account(path, errors="skip")
    assert found == ["a", "d"] and errors.counts == {"malformed": 1}
    # A column that is not there at all is a mistake of the configuration.
    path.write_text("id,body\n1,a\n")
    assert "no column 'text'" in refusal(path, errors="skip")


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "' + "x" * 5_000_000 + '"}\n{"text": "fine"}\n')
    options = {"max_document_bytes": 1_000_000}
    assert refusal(path, **options) == (
        f"{path}:2: a line of 5000013 bytes at byte 17; allowed: at most data.max_document_bytes (1000000)"
    )
    found, errors = account(path, errors="skip", **options)
    assert found == ["good", "fine"] and errors.counts == {"too long": 1}
    text = tmp_path / "a.txt"
    text.write_text("x" * 2_000_000)
    assert "one document of more than data.max_document_bytes (1000000)" in refusal(text, **options)
