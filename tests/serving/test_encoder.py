"""An encoder in its own process gives collections their vectors, and again when it is exchanged for another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from raylm.config.serving import ServingSection
from raylm.errors import UserError
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.encoder import open_encoder
from raylm.serving.retrieval.library import Library
from raylm.serving.retrieval.records import StoredDocument
from raylm.serving.retrieval.shelf import Shelf
from raylm.serving.stage import _check_encoder

DOCUMENTS = [StoredDocument("zebra", "Zebra", "It has stripes."), StoredDocument("北京", "", "北京是中国的首都。")]


def make_encoder(directory: Path, tokenizer_directory: Path, seed: int) -> str:
    """A tiny BERT without a head, with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return str(directory)


@pytest.mark.slow
def test_vectors_of_collections(tiny_model: Path, tmp_path: Path) -> None:
    asyncio.run(_vectors_of_collections(tiny_model, tmp_path))


async def _vectors_of_collections(tiny_model: Path, tmp_path: Path) -> None:
    path = make_encoder(tmp_path / "first", tiny_model, seed=1)
    encoder = open_encoder(path, ServingSection(), threads=1)
    try:
        long = "stripes " * 200
        (vector, _) = await encoder.vectors(["who has stripes", long])
        model, tokenizer = BertModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        with torch.inference_mode():
            hidden = model(**tokenizer("who has stripes", return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        assert vector == pytest.approx((hidden / hidden.norm()).numpy(), abs=1e-5)
        library = Library(CollectionStore(tmp_path / "collections"), encoder=encoder)
        shelf = Shelf(library)
        await shelf.create("animals")
        await shelf.add("animals", DOCUMENTS)
        facts = (await shelf.entry("animals")).facts
        assert (facts.passages, facts.embedded) == (2, 2)
        # Without a word in common, vectors alone find something.
        assert len(await shelf.search("animals", "xyz", 5)) == 2
        assert (await shelf.search("animals", "stripes", 5))[0].passage.id == "zebra"
        before = library.store.get("animals").index().vectors.copy()
    finally:
        encoder.engine.close()
    other = open_encoder(make_encoder(tmp_path / "second", tiny_model, seed=2), ServingSection(), threads=1)
    try:
        again = Library(CollectionStore(tmp_path / "collections"), encoder=other)
        again.tend()
        for _ in range(600):
            after = again.store.get("animals").index().vectors
            if after is not None and not np.allclose(before, after):
                break
            await asyncio.sleep(0.1)
        assert after is not None
        assert not np.allclose(before, after)
        assert np.linalg.norm(after, axis=1) == pytest.approx([1, 1], abs=1e-5)
    finally:
        other.engine.close()


def test_broken_encoders_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    directory = Path(make_encoder(tmp_path / "encoder", tiny_model, seed=1))
    _check_encoder(str(directory))
    with pytest.raises(UserError, match=r"serving.encoder: .*absent does not exist"):
        _check_encoder(str(tmp_path / "absent"))
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"serving.encoder: .*model.safetensors is damaged"):
        _check_encoder(str(directory))
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"serving.encoder: .*is missing"):
        _check_encoder(str(directory))
