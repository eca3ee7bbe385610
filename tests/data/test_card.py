"""The data card: its figures against the set's files, and a page that is whole and shows no text as markup."""

from __future__ import annotations

import html.parser
import json
import random
from pathlib import Path

import numpy as np
import pytest

from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare.stage import prepare_directory
from raylm.data.sources.documents import read_documents
from raylm.data.tokens.shards import TokenShards, read_manifest
from raylm.reports.report import write_report

from .conftest import write_jsonl

EVIL = "<script>alert('x')</script> & <b>bold</b>"
CHINESE = "他在图书馆里读了一本关于历史的我们从北京到上海坐火车去看朋友今天天气很好学生说中国文化是非常有意思，"
STORY = "It was a bright cold day in April, and the clocks were striking thirteen when he came home again, number "


@pytest.fixture(scope="module")
def card(ray_instance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    rows = [{"text": f"{STORY}{n} {n * n} {n + 1} {EVIL if n % 5 == 0 else ''}."} for n in range(60)]
    rows += [{"text": "".join(random.Random(n).choices(CHINESE, k=40)) + "。"} for n in range(30)]
    rows += [
        {"text": rows[3]["text"].upper()},
        {"text": rows[4]["text"] + " Once more."},
        {"text": ""},
        {"text": "tiny"},
    ]
    source = write_jsonl(root / f"{EVIL.replace('/', '')}.jsonl", rows)
    with source.open("a") as stream:
        stream.write("no JSON\n")
    data = DataSection(
        train=str(source),
        errors="skip",
        cleaning={"length": {"min_characters": 10}, "pii": ["email"]},
        deduplication={"shingle_words": 2},
        augmentation={"methods": [{"method": "swap", "fraction": 0.3}]},
    )
    prepare_directory(root / "set", data, TokenizerSection(type="bpe", vocab_size=400))
    return root / "set"


def test_figures_are_those_of_the_files(card: Path) -> None:
    report = json.loads((card / "report.json").read_text(encoding="utf-8"))
    lengths = [len(tokens) for split in ("train", "validation") for tokens in TokenShards(card, split).documents()]
    found = report["tokens_per_document"]
    assert sum(found["documents"]) == len(lengths) and found["longest"] == max(lengths)
    assert found["median"] == np.quantile(lengths, 0.5, method="nearest")
    edges = [*found["from"], max(lengths) + 1]
    assert found["documents"] == np.histogram(lengths, edges)[0].tolist()
    train = list(read_documents(card, "train"))
    assert report["languages"]["sampled"] == len(train)
    assert list(report["languages"]["documents"])[:2] == ["en", "zh"]
    duplicates = report["duplicates"]
    assert (duplicates["same"], duplicates["near"], duplicates["dropped"]) == (1, 1, 2)
    assert {e["dropped"][-10:] for e in duplicates["examples"]} == {(STORY + "3 9 4 .").upper()[-10:], "Once more."}
    assert report["cleaning"]["examples"]["length"] == [{"reason": "fewer than 10 characters", "text": "tiny"}]
    frequent = report["vocabulary"]["most_frequent"]
    assert [row["count"] for row in frequent] == sorted((row["count"] for row in frequent), reverse=True)
    assert report["vocabulary"]["ranks"][0] == [1, frequent[0]["count"]]


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "h2" and data.strip():
            self.titles.append(data.strip())
        self.text += data


def test_the_page_is_whole_and_escaped(card: Path) -> None:
    page = Page((card / "report.html").read_text(encoding="utf-8"))
    assert not page.links and "script" not in page.tags and "b" in page.tags
    assert EVIL in page.text and "http" not in page.text
    for title in ("Sources", "From input to set", "Left out by filters", "Duplicates", "Augmentation", "Lengths",
                  "Languages", "Tokenizer", "Examples", "Files", "Configuration",
                  "Input that could not be read"):  # fmt: skip
        assert title in page.titles
    for split in read_manifest(card)["splits"].values():
        assert all(entry["sha256"] in page.text and entry["path"] in page.text for entry in split["files"])
    assert "fewer than 10 characters" in page.text and "malformed JSON" in page.text
    assert page.tags.count("svg") == 3


def test_raylm_report_writes_the_card_again(card: Path) -> None:
    before = (card / "report.html").read_text(encoding="utf-8")
    (card / "report.html").unlink()
    (card / "config.yaml").write_text("stage: prepare\n")
    assert write_report([card]) == card / "report.html"
    assert (card / "report.html").read_text(encoding="utf-8") == before
