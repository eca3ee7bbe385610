"""Names in a question find the document of that name; passages keep their offsets; broken collections are refused."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from raylm.data.samples.passages import LONGEST_WEIGHT, passage_spans
from raylm.data.sources.documents import Document, DocumentFile
from raylm.errors import UserError
from raylm.serving.retrieval.prepared import collection_files, open_prepared
from raylm.serving.retrieval.store import StoredCollection
from raylm.serving.retrieval.text import content_words, tokenize


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[[list[Document]], StoredCollection]:
    """Makes a collection of documents as ``raylm prepare`` leaves them."""

    def make(documents: list[Document]) -> StoredCollection:
        (tmp_path / "documents").mkdir(exist_ok=True)
        with DocumentFile(tmp_path / "documents" / "train-00000.parquet", "documents") as writer:
            for document in documents:
                writer.write(document)
        return open_prepared(tmp_path, tmp_path / "index")

    return make


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("What does json.dumps do?", "json.dumps"),
        ("what is JSON.LOADS?", "json.loads"),
        ("What does os.path.join do?", "os.path.join"),
        ("How does `pickle.dumps()` work.", "pickle.dumps"),
        ("What does len do?", "len"),
        ("join path segments", "os.path.join"),
        ("How many items are in a container?", "len"),
    ],
)
def test_names_find_their_document(collection_directory: Path, tmp_path: Path, question: str, title: str) -> None:
    matches = open_prepared(collection_directory, tmp_path / "index").search(question, 3)
    assert matches[0].passage.title == title
    assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)


def test_nothing_in_common(collection_directory: Path, tmp_path: Path) -> None:
    collection = open_prepared(collection_directory, tmp_path / "index")
    assert collection.search("zebra xylophone ?!", 3) == []
    assert collection.search("?!", 3) == []


def test_relevance_says_how_much_of_the_question_is_there(collection_directory: Path, tmp_path: Path) -> None:
    collection = open_prepared(collection_directory, tmp_path / "index")
    assert collection.search("What does json.dumps do?", 1)[0].relevance == 1.0
    (unlikely, *_) = collection.search("Which volcano does a zebra join in winter?", 1)
    assert 0 < unlikely.relevance < 0.5


def test_tokenize() -> None:
    assert tokenize("Use os.path.join(a_b).") == ["use", "os.path.join", "os", "path", "join", "a_b", "a", "b"]
    assert tokenize("北京城 is") == ["北", "京", "城", "北京", "京城", "is"]
    assert tokenize("1998年") == ["1998", "年"]
    assert tokenize("__init__ 3.14") == ["__init__", "3.14", "3", "14"]
    assert tokenize("queries passes cats") == ["query", "passe", "cat"]
    assert content_words(tokenize("What does the len do, and len?")) == ["len"]
    assert content_words(tokenize("What is it?")) == content_words(tokenize("这是什么?")) == []
    assert "北京" in content_words(tokenize("什么是北京?"))


def test_stop_words_find_nothing(prepared: Callable) -> None:
    documents = [
        Document("sndhdr.what(filename)\n\nGuess the type of a sound file.", "sndhdr.what"),
        Document("copy.copy(x)\n\nShallow copy operation on arbitrary Python objects.", "copy.copy"),
        Document("module copy\n\nGeneric (shallow and deep) copying operations.", "copy"),
        Document("topic while\n\nThe statement is used for repeated execution.", "while"),
        Document("这 是 什么 的 说明", "什么"),
        Document("what it is, and what it does", "other", aliases="what.is.it"),
    ]
    collection = prepared(documents)
    found = collection.search("What does copy do?", 5)
    # What is named comes first, and nothing is found by "what" alone: not by title, alias or text.
    assert [match.passage.title for match in found] == ["copy", "copy.copy"]
    assert found[0].relevance == 1.0
    assert collection.search("What is it?", 5) == collection.search("这是的?", 5) == []
    # A stop word that is the whole title is still found.
    (match,) = collection.search("What does while do?", 5)
    assert (match.passage.title, match.relevance) == ("while", 1.0)


def test_what_is_named_comes_first_and_from_its_beginning(prepared: Callable) -> None:
    mentions = "\n\n".join(["asyncio.timeout and asyncio.timeout again " * 20] * 3)
    documents = [
        Document(f"class asyncio.Timeout\n\nAsynchronous context manager.\n\n{mentions}", "asyncio.Timeout"),
        Document(f"asyncio.timeout(delay)\n\nTimeout context manager.\n\n{mentions}", "asyncio.timeout"),
        Document(f"{mentions}", "A guide to asyncio.timeout"),
    ]
    collection = prepared(documents)
    for name in ("asyncio.timeout", "asyncio.Timeout"):
        (first, *_) = collection.search(f"What does {name} do?", 3)
        assert (first.passage.title, first.passage.start) == (name, 0)
    (first, *_) = collection.search("What is a guide to asyncio.timeout?", 3)
    assert first.passage.title == "asyncio.timeout"


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join(f"paragraph {number} " + "word " * 30 for number in range(20)),
        "One sentence of a very long paragraph. Another one! " * 100,
        "北京是中国的首都。城市很大，历史悠久；" * 100,
        "x" * 4000,
        "no sentence ends here " * 300,
    ],
    ids=["paragraphs", "sentences", "chinese", "one word", "one sentence"],
)
def test_passages_keep_all_of_the_text(text: str) -> None:
    spans = list(passage_spans(text))
    assert "".join(text[start:end] for start, end in spans).split() != []
    assert "".join("".join(text[start:end].split()) for start, end in spans) == "".join(text.split())
    assert len(spans) > 2
    assert all(0 < end - start <= LONGEST_WEIGHT for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("\n" * 200_000, 0),
        ("\n " * 100_000, 0),
        (" " * 200_000 + "x", 1),
        ("北" * 200_000, 400),
        ("." * 200_000, 134),
        ("a. " * 70_000, 234),
        ("a\n\n" * 70_000, 117),
    ],
    ids=["newlines", "lines of a space", "spaces", "no full stop", "full stops", "short sentences", "short paragraphs"],
)
def test_no_text_takes_long_to_cut(text: str, passages: int) -> None:
    """Seconds to minutes before: each place, or each piece, looked at all that followed."""
    began = time.process_time()
    spans = list(passage_spans(text))
    assert time.process_time() - began < 2
    assert len(spans) == passages


def test_sentences_of_a_long_paragraph_stay_whole() -> None:
    text = "北京是中国的首都。城市很大。" * 100
    assert all(text[end - 1] == "。" for _, end in passage_spans(text))


def test_long_documents_are_found_by_their_end(prepared: Callable) -> None:
    text = "\n\n".join(["filler words here " * 40] * 10 + ["the armadillo paragraph"])
    (match,) = prepared([Document(text, "A"), Document("other filler words", "B")]).search("armadillos", 5)
    assert match.passage.title == "A"
    assert match.passage.text.endswith("armadillo paragraph")
    assert text[match.passage.start : match.passage.end] == match.passage.text


def test_one_passage_a_document(prepared: Callable) -> None:
    long = "\n\n".join(f"the armadillo, part {number}: " + "word " * 150 for number in range(4))
    documents = [Document(long, "A"), Document("an armadillo " + "digs " * 150, "B"), Document("nothing", "C")]
    matches = prepared(documents).search("armadillo", 3)
    assert sorted(match.passage.title for match in matches) == ["A", "B"]


def test_aliases_are_found(prepared: Callable) -> None:
    documents = [
        Document("posixpath.join(a, *p)\n\nJoin pathname components.", "posixpath.join", aliases="os.path.join"),
        Document("Path.joinpath\n\nCombine this path; os.path.join does the same.", "pathlib.Path.joinpath"),
    ]
    (first, *_) = prepared(documents).search("What does os.path.join do?", 3)
    assert first.passage.title == "posixpath.join"


def test_prepared_documents_that_change_are_indexed_again(prepared: Callable) -> None:
    collection = prepared([Document("the armadillo", "A"), Document("without any words: ?!", "?")])
    version = collection.facts().version
    assert prepared([Document("the armadillo", "A"), Document("without any words: ?!", "?")]).facts().version == version
    changed = prepared([Document("a pangolin instead", "B")])
    assert [match.passage.title for match in changed.search("pangolin or armadillo", 3)] == ["B"]
    # Who had it open sees the change as well.
    assert [match.passage.title for match in collection.search("pangolin or armadillo", 3)] == ["B"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"serving.collection: .*absent does not exist"):
        collection_files(tmp_path / "absent")
    with pytest.raises(UserError, match="no documents/"):
        collection_files(tmp_path)
    (tmp_path / "documents").mkdir()
    file = tmp_path / "documents" / "train-0.parquet"
    file.write_text("not parquet")
    with pytest.raises(UserError, match="cannot be read"):
        collection_files(tmp_path)
    parquet.write_table(pyarrow.table({"id": ["a"], "text": ["b"]}), file)
    with pytest.raises(UserError, match="no column title"):
        collection_files(tmp_path)
    parquet.write_table(pyarrow.table({"id": [], "title": [], "text": []}), file)
    with pytest.raises(UserError, match="holds no documents"):
        collection_files(tmp_path)
