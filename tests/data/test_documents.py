from __future__ import annotations

import pytest

from raylm.data.sources.documents import Document, DocumentFile, make_pair, read_documents, split_of
from raylm.errors import UserError


def test_split_is_about_the_fraction_and_adding_documents_moves_none():
    texts = [f"document {number}" for number in range(20_000)]
    sides = {text: split_of(Document(text=text), 0.1) for text in texts}
    held_out = [text for text, side in sides.items() if side == "validation"]
    assert 1850 < len(held_out) < 2150
    # A larger share only adds to what is held out.
    assert all(split_of(Document(text=text), 0.2) == "validation" for text in held_out)
    assert {split_of(Document(text=text), 0.0) for text in texts} == {"train"}


def test_split_goes_by_the_key_where_there_is_one():
    for number in range(200):
        one = Document(text="some text", split_key=f"name {number}")
        other = make_pair("What?", "That.", split_key=f"name {number}")
        assert split_of(one, 0.5) == split_of(other, 0.5)
    assert split_of(Document(text="x", split="validation"), 0.0) == "validation"


@pytest.mark.parametrize("kind", ["documents", "pairs"])
def test_documents_come_back_from_their_files(tmp_path, kind):
    documents = [
        make_pair(f"Q{number}?", "A 猫.", "context" if number % 2 else "", title=f"t{number}")
        if kind == "pairs"
        else Document(text=f"text {number} 🙂" * 50, title=f"t{number}")
        for number in range(500)
    ]
    (tmp_path / "documents").mkdir()
    writers = [DocumentFile(tmp_path / "documents" / f"train-0000{number}.parquet", kind) for number in range(2)]
    for number, writer in enumerate(writers):
        with writer:
            for document in documents[number * 200 : 200 if number == 0 else None]:
                writer.write(document)
    assert sum(writer.documents for writer in writers) == 500
    assert sum(writer.bytes for writer in writers) == sum(len(document.text.encode()) for document in documents)
    back = list(read_documents(tmp_path, "train"))
    assert [(d.text, d.title, d.prompt, d.answer, d.context) for d in back] == [
        (d.text, d.title, d.prompt, d.answer, d.context) for d in documents
    ]
    assert all(document.split == "train" for document in back)
    assert [d.id for d in back] == [d.id for d in documents]
    writers[0].path.write_bytes(b"PAR1 no longer")
    with pytest.raises(UserError, match=r"train-00000.parquet: damaged document file"):
        list(read_documents(tmp_path, "train"))
