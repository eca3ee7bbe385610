"""A question is put to the model in the very ids that pairs with a passage are trained in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylm.config.data import TokenizerSection
from raylm.data.loading import load_tokenizer
from raylm.data.sources.documents import Document, DocumentFile
from raylm.data.sources.stdlib import stdlib_documents, stdlib_pairs
from raylm.data.tokens.encoding import PairEncoder
from raylm.data.tokens.tokenizers import make_tokenizer
from raylm.serving.deploy.service import ModelService
from raylm.serving.retrieval.prepared import open_prepared
from raylm.serving.tasks.answering import fit_prompt

CONTEXT, ANSWER_TOKENS = 512, 128


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return stdlib_documents()[::16]


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    section = TokenizerSection(type="bpe", vocab_size=1024)
    make_tokenizer(section, (document.text for document in documents)).save_pretrained(directory)
    return directory


def test_trained_and_served_prompts_are_equal(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    with DocumentFile(tmp_path / "documents" / "train-00000.parquet", "documents") as writer:
        for document in documents:
            writer.write(document)
    collection = open_prepared(tmp_path, tmp_path / "index")
    pairs = stdlib_pairs(documents, with_context=True)
    trained, columns = PairEncoder(tokenizer).encode(pairs)
    engine: Any = SimpleNamespace()
    service = ModelService("model", engine, load_tokenizer(tokenizer), CONTEXT, 256, 8)
    equal = 0
    for pair, ids, (answer, *_) in zip(pairs, trained, columns, strict=True):
        matches = collection.search(pair.prompt, 1)
        assert matches[0].passage.text == pair.context
        served, used = fit_prompt(service, pair.prompt, matches, ANSWER_TOKENS)
        assert used == 1
        if answer <= CONTEXT - ANSWER_TOKENS:
            assert served == ids[:answer].tolist()
            equal += 1
        else:
            # What the context cannot hold is cut from the passage's end.
            assert len(served) <= CONTEXT - ANSWER_TOKENS
    assert equal > 0.9 * len(pairs)
