from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from raylm.data.sources.documents import read_documents
from raylm.data.tokens.shards import TokenShards, token_dtype, verify_prepared
from raylm.errors import UserError


@pytest.fixture
def copy(prepared_documents: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "copy"
    shutil.copytree(prepared_documents, directory)
    return directory


def test_documents_decode_to_their_texts(prepared_documents):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared_documents / "tokenizer")
    for split in ("train", "validation"):
        shards = TokenShards(prepared_documents, split)
        texts = [document.text for document in read_documents(prepared_documents, split)]
        decoded = [tokenizer.decode(tokens[:-1]) for tokens in shards.documents()]
        assert decoded == texts and len(texts) == shards.document_count
        assert all(tokens[-1] == shards.eos_id for tokens in shards.documents())
        assert sum(len(text.encode()) for text in texts) == shards.byte_count
        # What looks like a special token in a text is no end of a document.
        assert any("<|endoftext|>" in text for text in texts)
        stream = shards.read(0, shards.token_count)
        assert (stream == shards.eos_id).sum() == shards.document_count + 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_set_without_its_tokenizer_is_refused(copy: Path, name: str) -> None:
    verify_prepared(copy)
    path = copy / "tokenizer" / name
    path.write_text("{")
    with pytest.raises(UserError, match=rf"{name}: damaged: .*; prepare the data again"):
        verify_prepared(copy)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: missing; prepare the data again"):
        verify_prepared(copy)
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match=r"tokenizer\.json: missing; prepare the data again"):
        verify_prepared(copy)


def test_reads_across_files(tmp_path):
    """Three files of a hand-made set: read and take agree with the concatenation."""
    parts = [np.arange(5), np.arange(100, 101), np.arange(200, 207)]
    entries = []
    (tmp_path / "train").mkdir()
    for number, part in enumerate(parts):
        (tmp_path / "train" / f"{number}.bin").write_bytes(part.astype("<u4").tobytes())
        entries.append({"path": f"train/{number}.bin", "tokens": len(part)})
    split = {"documents": 0, "tokens": 13, "bytes": 0, "files": entries}
    manifest = {"version": 1, "kind": "documents", "eos_id": 0, "pad_id": 0, "dtype": "uint32"}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "splits": {"train": split}}))
    shards, whole = TokenShards(tmp_path, "train"), np.concatenate(parts)
    for start in range(14):
        for stop in range(start, 14):
            assert np.array_equal(shards.read(start, stop), whole[start:stop])
    positions = np.array([[12, 0, 5], [4, 6, 5]])
    assert np.array_equal(shards.take(positions), whole[positions])
    with pytest.raises(IndexError):
        shards.read(3, 14)


def test_dtype_holds_every_id():
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")


def test_a_directory_that_is_not_prepared_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a prepared directory"):
            TokenShards(path, "train")
    (tmp_path / "manifest.json").write_text('{"half')
    with pytest.raises(UserError, match="damaged"):
        TokenShards(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match="not a manifest of raylm"):
        TokenShards(tmp_path, "train")


def test_a_truncated_shard_is_refused_on_opening(copy):
    path = copy / "train" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"tokens-00000.bin: damaged shard: \d+ bytes, \d+ in the manifest"):
        TokenShards(copy, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"tokens-00000.bin: missing"):
        TokenShards(copy, "train")


@pytest.mark.parametrize("name", ["train/tokens-00000.bin", "validation/index-00000.npy", "documents/train-*.parquet"])
def test_a_flipped_bit_is_found_by_its_checksum(copy, name):
    verify_prepared(copy)
    path = next(copy.glob(name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}: damaged shard: wrong checksum"):
        verify_prepared(copy)
