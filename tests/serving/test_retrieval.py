"""Names in a question find the document of that name; broken collections are refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from raylm.errors import UserError
from raylm.serving.retrieval import PASSAGE_CHARACTERS, Collection, collection_files, split_passages, tokenize


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
def test_names_find_their_document(collection_directory: Path, question: str, title: str) -> None:
    matches = Collection.open(collection_directory).search(question, 3)
    assert matches[0].passage.title == title
    assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)


def test_nothing_in_common(collection_directory: Path) -> None:
    assert Collection.open(collection_directory).search("zebra xylophone ?!", 3) == []


def test_tokenize() -> None:
    assert tokenize("Use os.path.join(a_b).") == ["use", "os.path.join", "os", "path", "join", "a_b", "a", "b"]
    assert tokenize("北京 is") == ["北京", "北", "京", "is"]
    assert tokenize("__init__ 3.14") == ["__init__", "3.14", "3", "14"]


def test_passages_keep_all_of_the_text() -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * 30 for number in range(20))
    passages = list(split_passages(text))
    assert "\n\n".join(passages).split() == text.split()
    assert len(passages) > 3
    assert all(len(passage) < 2 * PASSAGE_CHARACTERS for passage in passages)


def test_long_documents_are_found_by_their_end(tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    text = "\n\n".join(["filler words here " * 40] * 10 + ["the armadillo paragraph"])
    table = pyarrow.table({"id": ["a", "b"], "title": ["A", "B"], "text": [text, "other filler words"]})
    parquet.write_table(table, tmp_path / "documents" / "train-0.parquet")
    (match,) = Collection.open(tmp_path).search("armadillo", 5)
    assert match.passage.id == "a"
    assert match.passage.text.endswith("armadillo paragraph")


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
