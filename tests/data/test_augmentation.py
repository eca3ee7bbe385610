"""``data.augmentation``: variants without a model, classes evened out, and what the prepared set says of both."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from raylm.config.augmentation import AugmentationSection, MethodSection
from raylm.config.data import DataSection, TokenizerSection
from raylm.config.loading import validate
from raylm.data.augmentation.prompts import pair_in
from raylm.data.augmentation.served_model import Unanswered
from raylm.data.augmentation.word_edits import Draw, draw_key, make_variant, read_synonyms
from raylm.data.prepare.stage import prepare_directory, prepared_directory
from raylm.data.samples.opening import open_samples
from raylm.data.sources.documents import Document, make_pair, read_documents, split_of
from raylm.data.tokens.shards import verify_prepared
from raylm.errors import UserError

from .conftest import write_jsonl
from .test_prepare import content_of

TEXT = "The quick brown fox doesn't jump over 2 lazy dogs, but it runs: far and fast!"
CHINESE = "快速的棕色狐狸，跳过了懒狗。"


def variant(text: str, number: int = 1, synonyms: dict | None = None, **settings) -> str:
    method = MethodSection(**settings)
    return make_variant(text, method, synonyms, draw_key(3, text, method, number))


def words(text: str) -> list[str]:
    return text.replace(",", "").replace(":", "").replace("!", "").split()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.9])
def test_swap_and_delete_change_the_share_that_is_asked_for(share: float) -> None:
    swapped = variant(TEXT, method="swap", share=share)
    assert sorted(words(swapped)) == sorted(words(TEXT)) and swapped != TEXT
    # Signs and spaces stay where they are.
    assert [i for i, c in enumerate(swapped.split()) if c[-1] in ",:!"] == [9, 12, 15]
    count = max(1, round(share * len(words(TEXT))))
    deleted = variant(TEXT, method="delete", share=share)
    left = words(deleted)
    assert len(left) == len(words(TEXT)) - count
    rest = iter(words(TEXT))
    assert all(word in rest for word in left), "in the order of the original"
    assert "  " not in deleted


def test_chinese_is_taken_by_characters_or_by_words() -> None:
    pytest.importorskip("rjieba")
    by_characters = variant(CHINESE, method="delete", share=0.5)
    assert len(by_characters) == len(CHINESE) - 6 and by_characters[-1] == "。" and "，" in by_characters
    by_words = variant(CHINESE, method="swap", share=0.1, segmenter="jieba")
    assert sorted(by_words) == sorted(CHINESE) != list(by_words)
    assert "狐狸" in by_words and "快速" in by_words


def test_synonyms_keep_case_and_spans_are_hidden(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.tsv"
    path.write_text("# English and Chinese\nquick\tfast\tswift\nthe\ta\n狐狸\t狼\n", encoding="utf-8")
    synonyms = read_synonyms(str(path))
    assert synonyms == {"quick": ["fast", "swift"], "the": ["a"], "狐狸": ["狼"]}
    made = {variant(TEXT, n, synonyms, method="synonym", share=0.9, dictionary="x") for n in range(20)}
    assert made == {TEXT.replace("The quick", f"A {word}") for word in ("fast", "swift")}
    assert variant("QUICK", 1, {"quick": ["fast"]}, method="synonym", dictionary="x") == "FAST"
    if pytest.importorskip("rjieba"):
        assert "狼" in variant(CHINESE, 1, synonyms, method="synonym", dictionary="x", segmenter="jieba")
    hidden = variant(TEXT, method="span_mask", share=0.4, span_words=3, mask="___")
    assert hidden.count("___") == 2 and len(words(hidden)) == len(words(TEXT)) - 4
    path.write_text("quick fast\n")
    with pytest.raises(UserError, match=r"synonyms\.tsv:1: found 'quick fast', allowed: a word, a tab"):
        read_synonyms(str(path))


@pytest.mark.parametrize("method", ["swap", "delete", "span_mask"])
@pytest.mark.parametrize("text", ["", " ", "one", "!?", "字", "\n\n a\tb \n"])
def test_any_text_is_taken(method: str, text: str) -> None:
    made = variant(text, method=method)
    assert made == variant(text, method=method)
    assert method == "span_mask" or len(made) <= len(text)


def test_a_variant_is_a_function_of_seed_text_method_and_number() -> None:
    made = [variant(TEXT, n, method="swap") for n in range(8)]
    assert made == [variant(TEXT, n, method="swap") for n in range(8)] and len(set(made)) > 4
    one, other = (draw_key(seed, TEXT, MethodSection(method="swap"), 1) for seed in (0, 1))
    assert one != other


MISTAKES = [
    ({}, "give methods, balance, or both"),
    ({"methods": [{"method": "paraphrase"}]}, "model: missing; the method paraphrase needs a served model"),
    ({"methods": [{"method": "swap", "mask": "x"}]}, "mask: found with the method swap, allowed with: span_mask"),
    ({"methods": [{"method": "copy", "part": "answer"}]}, "part: leave it out with the method copy"),
    ({"methods": [{"method": "synonym"}]}, "dictionary: missing; the method synonym needs a file"),
    ({"methods": [{"method": "wap"}]}, "found 'wap', allowed: 'copy', 'swap'"),
    ({"methods": [{"method": "swap", "share": 2.0}]}, "share: found 2.0"),
]


@pytest.mark.parametrize(("values", "expected"), MISTAKES)
def test_mistakes_are_named(values: dict, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(AugmentationSection, values, "file.yaml")
    assert expected in str(caught.value)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with three classes: of 60, 20 and 5."""
    counts = {"a": 60, "b": 20, "c": 5}
    rows = [
        {"prompt": f"Which class has number {number} of {name}?", "answer": f"The answer is {name}.", "class": name}
        for name, count in counts.items()
        for number in range(count)
    ]
    return write_jsonl(tmp_path_factory.mktemp("labelled") / "pairs.jsonl", rows)


METHODS = [
    {"method": "copy"},
    {"method": "swap", "times": 2, "fraction": 0.5},
    {"method": "delete", "part": "answer"},
    {"method": "span_mask"},
]


def prepare(directory: Path, source: Path, augmentation: dict, cpus: int = 2, **data) -> list[Document]:
    section = DataSection(
        train=str(source), fields={"label": "class"}, augmentation=augmentation, validation_fraction=0.2, **data
    )
    prepare_directory(directory, section, TokenizerSection(type="byte"), cpus=cpus)
    verify_prepared(directory)
    return [document for split in ("train", "validation") for document in read_documents(directory, split)]


def test_variants_are_marked_and_stay_out_of_validation(ray_instance, labelled: Path, tmp_path: Path) -> None:
    found = prepare(tmp_path / "one", labelled, {"methods": METHODS}, cpus=1)
    originals = {document.id: document for document in found if not document.augmentation}
    train = [document for document in originals.values() if document.split == "train"]
    assert len(originals) == 85 and 5 < len(originals) - len(train) < 30
    counts = Counter(document.augmentation.partition(":")[0] for document in found)
    assert counts["copy"] == counts["delete"] == counts["span_mask"] == len(train)
    assert 0.6 * len(train) < counts["swap"] < 1.4 * len(train)
    for document in found:
        if not document.augmentation:
            continue
        method, source, number = document.augmentation.split(":")
        original = originals[source]
        assert document.split == original.split == "train" and document.label == original.label
        assert (document.text == original.text) == (method == "copy") and int(number) >= 1
        changed = {name for name in ("prompt", "answer") if getattr(document, name) != getattr(original, name)}
        assert changed == {"copy": set(), "delete": {"answer"}}.get(method, {"prompt"})
    assert open_samples(tmp_path / "one", "train", 256, seed=0).count == sum(d.split == "train" for d in found)
    prepare(tmp_path / "two", labelled, {"methods": METHODS}, cpus=4)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    # A set that is made of it keeps the marks, and makes no variants of variants.
    again = DataSection(train=str(tmp_path / "one"), augmentation={"methods": [{"method": "copy"}]})
    with pytest.raises(UserError, match=r"data.augmentation: leave it out, .* is prepared already"):
        prepared_directory(again)
    prepare_directory(tmp_path / "again", again, TokenizerSection(type="byte"))
    marks = Counter(d.augmentation.partition(":")[0] for d in read_documents(tmp_path / "again", "train"))
    assert marks == {**counts, "": len(train), "copy": 2 * len(train)}


@pytest.mark.parametrize(("method", "limit"), [("oversample", 10), ("oversample", 2), ("undersample", 10)])
def test_classes_are_evened_out_exactly(ray_instance, labelled: Path, tmp_path: Path, method: str, limit: int) -> None:
    balance = {"by": "label", "method": method, "max_copies": limit}
    found = prepare(tmp_path / "set", labelled, {"balance": balance})
    pairs = [json.loads(line) for line in labelled.read_text().splitlines()]
    before = Counter(p["class"] for p in pairs if split_of(make_pair(p["prompt"], p["answer"]), 0.2) == "train")
    after = Counter(document.label for document in found if document.split == "train")
    most, least = max(before.values()), min(before.values())
    for name, count in before.items():
        assert after[name] == (least if method == "undersample" else min(most, limit * count))
    marks = Counter(document.augmentation.partition(":")[0] for document in found)
    assert set(marks) == ({""} if method == "undersample" else {"", "oversample"})
    assert not any(document.augmentation for document in found if document.split == "validation")


def test_a_label_that_is_not_there_is_refused(ray_instance, labelled: Path, tmp_path: Path) -> None:
    data = DataSection(train=str(labelled), augmentation={"balance": {"by": "label"}})
    with pytest.raises(UserError, match=r"found label, which needs data\.fields\.label"):
        prepare_directory(tmp_path / "set", data, TokenizerSection(type="byte"))
    data = DataSection(train=str(labelled), fields={"label": "klass"})
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: no column 'klass'; columns found: prompt, answer, class"):
        prepare_directory(tmp_path / "set", data, TokenizerSection(type="byte"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("size", [2, 3, 64, 1000])
def test_words_are_drawn_from_those_that_are_left(size: int) -> None:
    items = [7 * place for place in range(size)]
    for count in (1, 2, size // 2, size, size + 5):
        left, draw = list(items), Draw(f"{size} {count}")
        expected = [left.pop(draw.below(len(left))) for _ in range(min(count, size))]
        assert Draw(f"{size} {count}").some(items, count) == expected
    assert list(Draw("two").two(items)) == Draw("two").some(items, 2)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("Question: What is it?\nAnswer: A list.\nOf words.", ("What is it?", "A list.\nOf words.")),
        ("Sure!\n\nQUESTION : a\n b \n\n  answer：c ", ("a\n b", "c")),
        ("问题：这是什么？\n答案：一本书。", ("这是什么？", "一本书。")),
        ("Question: a Answer: b", None),
        ("Question:\nAnswer: b", None),
        ("Question: a\nAnswer: ", None),
        ("Answer: b\nQuestion: a", None),
    ],
)
def test_a_pair_is_read_from_an_answer(text: str, pair: tuple[str, str] | None) -> None:
    if pair is None:
        with pytest.raises(Unanswered, match="no lines 'Question"):
            pair_in(text)
    else:
        assert pair_in(text) == pair
