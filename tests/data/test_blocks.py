from __future__ import annotations

import json
import random

import pytest

from raylm.config.data import DataSection
from raylm.data.sources.blocks import Block, block_bytes, cut
from raylm.data.sources.corpus import Corpus
from raylm.data.sources.lines import Lines
from raylm.data.sources.readers import read_block
from raylm.data.sources.segments import open_sources
from raylm.data.sources.streams import InputErrors


def read(path, size: int, **options) -> list[list[str]]:
    """Texts of each block, for blocks of ``size`` bytes."""
    data = DataSection(train=str(path), **options)
    (source,) = open_sources(data, [str(path)], "data.train")
    blocks = [Block(number, 0, None, segments) for number, segments in enumerate(cut(source.segments, size))]
    assert [Block.from_json(json.loads(json.dumps(block.to_json()))) for block in blocks] == blocks
    return [[d.text for d in read_block(block, data, InputErrors("strict"))] for block in blocks]


@pytest.fixture
def text(tmp_path):
    """Lines of 0 to 40 characters of one to four bytes, with blank lines, and none at the end."""
    draw = random.Random(3)
    lines = ["".join(draw.choices("abc é猫🙂", k=draw.choice([0, 0, 3, 12, 40]))) for _ in range(60)]
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(["\ufefffirst", *lines, "last"]).encode())
    return path


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_ranges_share_out_every_line_and_paragraph_once(text, unit):
    (whole,) = read(text, 1 << 20, text_unit=unit)
    assert whole[0].startswith("first") and whole[-1].endswith("last")
    for size in range(7, 400, 9):
        parts = read(text, size, text_unit=unit)
        assert len(parts) > 1 and [text for part in parts for text in part] == whole


def test_ranges_of_jsonl_go_by_the_columns_of_its_first_row(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q{n}", "answer": f"a{n}"} for n in range(50)]
    rows[20] = {"text": "no pair", "prompt": "Q", "answer": "A"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (whole,) = read(path, 1 << 20)
    for size in (30, 100, 333):
        assert [text for part in read(path, size) for text in part] == whole


def test_row_groups_of_parquet(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("raylm.data.sources.segments.SMALLEST_BLOCK", 100)
    path = tmp_path / "a.parquet"
    texts = [f"text {number}" for number in range(95)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10)
    parts = read(path, 1000)
    assert len(parts) > 1 and [text for part in parts for text in part] == texts


def test_small_files_share_a_block_and_the_size_grows_with_the_input(tmp_path):
    for number in range(700):
        (tmp_path / f"{number:03}.txt").write_text(f"text {number}")
    corpus = Corpus(DataSection(train=str(tmp_path)))
    assert [len(block.segments) for block in corpus.blocks] == [512, 188]
    assert [document.text for _, document in corpus.documents()] == [f"text {number}" for number in range(700)]
    assert (block_bytes(10 << 20), block_bytes(1 << 30), block_bytes(1 << 40)) == (1 << 20, 4 << 20, 1 << 29)


def test_a_text_file_that_is_one_document_is_not_cut(tmp_path):
    (tmp_path / "a.txt").write_text("line of text\n" * 200_000)
    corpus = Corpus(DataSection(train=str(tmp_path / "a.txt")))
    assert len(corpus.blocks) == 1 and len(list(corpus.documents())) == 1


def test_a_line_that_goes_on_beyond_a_range_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 200_000 + '"}\n{"text": "last"}\n')
    passed = []
    monkeypatch.setattr(
        Lines, "_pass", staticmethod(lambda *given, whole=Lines._pass: passed.append(whole(*given)) or passed[-1])
    )
    parts = read(path, 10_000)
    assert [len(text) for part in parts for text in part] == [200_000, 4]
    assert len(parts) == 21 and sum(passed) < 1.1 * path.stat().st_size
