from __future__ import annotations

from raylm.config.data import DataSection
from raylm.data.samples.evaluation_texts import evaluation_texts
from raylm.data.tokens.shards import TokenShards


def test_a_prepared_split_has_the_bytes_of_its_manifest(prepared_documents, prepared_pairs):
    for directory in (prepared_documents, prepared_pairs):
        for split in ("train", "validation"):
            texts = list(evaluation_texts(DataSection(train=str(directory)), split))
            shards = TokenShards(directory, split)
            assert len(texts) == shards.document_count
            assert sum(len(text.encode()) for text in texts) == shards.byte_count


def test_raw_validation_sources_are_the_validation_texts(tmp_path):
    (tmp_path / "train.txt").write_text("one\n \ntwo\n")
    (tmp_path / "held-out.txt").write_text("three\n")
    train, held_out = str(tmp_path / "train.txt"), str(tmp_path / "held-out.txt")
    both = DataSection(train=train, validation=held_out, text_unit="line")
    assert list(evaluation_texts(both)) == ["three"]
    assert list(evaluation_texts(both, "train")) == ["one", "two"]
    assert list(evaluation_texts(DataSection(train=train, text_unit="line"))) == ["one", "two"]
