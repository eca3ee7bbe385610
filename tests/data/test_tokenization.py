from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from raylm.config.data import TokenizerSection
from raylm.data.prepare.jobs import run_jobs
from raylm.data.sources.documents import Document, DocumentFile, read_documents
from raylm.data.tokens.tokenization import ShardFormat, is_taken, make_files
from raylm.data.tokens.tokenizers import make_tokenizer
from raylm.errors import RunFailure, UserError

LAYOUT = ShardFormat(kind="documents", dtype="<u2", eos_id=0, unknown_id=4)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A part of four documents, one held out, and a character tokenizer that knows only a and b."""
    make_tokenizer(TokenizerSection(type="character"), iter(["ab"])).save_pretrained(tmp_path / "tokenizer")
    for name in ("parts", "files", "duplicates"):
        (tmp_path / "work" / name).mkdir(parents=True)
    with DocumentFile(tmp_path / "work" / "parts" / "p.parquet", "documents", with_split=True) as file:
        for text in ("ab", "a?b", "bb", "aaa"):
            file.write(Document(text=text).on_side("validation" if text == "bb" else "train"))
    # Document 13 repeats document 2.
    np.save(tmp_path / "work" / "duplicates" / "d.npy", np.array([[13], [2], [1_000_000]]))
    return tmp_path


def job(**values) -> dict:
    return {
        "number": 7,
        "part": "p",
        "source": 0,
        "first": 10,
        "documents": 4,
        "copy": 0,
        "leading": ["train"],
        **values,
    }


def test_files_of_a_part_and_their_entries(directory):
    found = make_files(job(), str(directory), asdict(LAYOUT), ["duplicates/d.npy"], [1.0])
    train, validation = found["entries"]
    # The leading file begins with an end-of-text token; "?" is unknown; the duplicate is left out.
    assert np.fromfile(directory / train["path"], dtype="<u2").tolist() == [0, 5, 6, 0, 5, 4, 6, 0]
    assert (train["tokens"], train["documents"], train["bytes"], train["unknown_tokens"]) == (8, 2, 5, 1)
    assert np.load(directory / train["index"]["path"]).tolist() == [[1], [4]]
    assert np.fromfile(directory / validation["path"], dtype="<u2").tolist() == [6, 6, 0]
    assert found["duplicates"] == 1 and (directory / "work" / "files" / "000007.json").is_file()
    assert [document.text for document in read_documents(directory, "train")] == ["ab", "a?b"]
    assert not list(directory.glob("*/.*.partial"))


def test_a_weight_takes_documents_more_than_once_and_the_held_out_ones_once(directory):
    second = make_files(job(copy=1), str(directory), asdict(LAYOUT), [], [2.0])
    assert [(entry["split"], entry["documents"]) for entry in second["entries"]] == [("train", 3)]
    documents = [Document(text=f"text {number}") for number in range(4000)]
    taken = [sum(is_taken(document, 2.3, copy) for copy in range(3)) for document in documents]
    assert set(taken) == {2, 3} and sum(taken) == pytest.approx(2.3 * 4000, rel=0.02)


def test_a_failed_task_is_named(ray_instance, directory):
    (directory / "work" / "parts" / "p.parquet").write_bytes(b"damaged")
    arguments = {"directory": str(directory), "layout": asdict(LAYOUT), "duplicates": [], "weights": [1.0]}
    with pytest.raises(UserError, match=r"p.parquet: damaged document file"):
        run_jobs("tokenizing", make_files, [job()], cpus=2, arguments=arguments)
    with pytest.raises(RunFailure, match=r"tokenizing failed: .*missing 3 required positional arguments"):
        run_jobs("tokenizing", make_files, [job()], cpus=2, arguments={"directory": str(directory)})
