"""What a question's sources are: one passage a document, documents found under all of their names."""

from __future__ import annotations

from pathlib import Path

from raylm.data.documents import Document, DocumentFile
from raylm.serving.retrieval import Collection


def prepared(directory: Path, documents: list[Document]) -> Path:
    (directory / "documents").mkdir()
    with DocumentFile(directory / "documents" / "train-00000.parquet", "documents") as writer:
        for document in documents:
            writer.write(document)
    return directory


def test_one_passage_a_document(tmp_path: Path) -> None:
    long = "\n\n".join(f"the armadillo, part {number}: " + "word " * 150 for number in range(4))
    documents = [Document(long, "A"), Document("an armadillo " + "digs " * 150, "B"), Document("nothing", "C")]
    matches = Collection.open(prepared(tmp_path, documents)).search("armadillo", 3)
    assert sorted(match.passage.title for match in matches) == ["A", "B"]


def test_aliases_are_found(tmp_path: Path) -> None:
    documents = [
        Document("posixpath.join(a, *p)\n\nJoin pathname components.", "posixpath.join", aliases="os.path.join"),
        Document("Path.joinpath\n\nCombine this path; os.path.join does the same.", "pathlib.Path.joinpath"),
    ]
    (first, *_) = Collection.open(prepared(tmp_path, documents)).search("What does os.path.join do?", 3)
    assert first.passage.title == "posixpath.join"
