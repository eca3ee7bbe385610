from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raylm.config.data import TokenizerSection
from raylm.data.documents import Document, DocumentWriter
from raylm.data.tokenization import Layout, tokenize_documents, write_token_file
from raylm.data.tokenizers import make_tokenizer
from raylm.errors import RunFailure


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two document files and a character tokenizer that knows only a and b."""
    make_tokenizer(TokenizerSection(type="character"), iter(["ab"])).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "documents").mkdir()
    with DocumentWriter(tmp_path / "documents", "train", "documents", file_bytes=4) as writer:
        for text in ("ab", "a?b", "bb"):
            writer.write(Document(text=text))
    assert len(writer.paths) == 2
    return tmp_path


LAYOUT = Layout(kind="documents", dtype="<u2", eos_id=0, unknown_id=4)


def test_a_token_file_and_its_entry(directory):
    source = directory / "documents" / "train-00000.parquet"
    entry = write_token_file(directory, "train", 0, source, LAYOUT)
    tokens = np.fromfile(directory / entry["path"], dtype="<u2")
    # The first file begins with an end-of-text token; "?" is unknown.
    assert tokens.tolist() == [0, 5, 6, 0, 5, 4, 6, 0]
    assert (entry["tokens"], entry["documents"], entry["bytes"], entry["unknown_tokens"]) == (8, 2, 5, 1)
    assert np.load(directory / entry["index"]["path"]).tolist() == [[1], [4]]
    second = write_token_file(directory, "train", 1, directory / "documents" / "train-00001.parquet", LAYOUT)
    assert np.fromfile(directory / second["path"], dtype="<u2").tolist() == [6, 6, 0]
    assert not list(directory.glob("train/*.partial")) and not list(directory.glob("train/.*"))


def test_a_failed_task_is_named(ray_instance, directory):
    files = [("train", path) for path in sorted((directory / "documents").glob("*.parquet"))]
    files[1][1].write_bytes(b"damaged")
    with pytest.raises(RunFailure, match=r"tokenizing failed: .*train-00001.parquet: damaged document file"):
        tokenize_documents(directory, files, LAYOUT, cpus=2)
