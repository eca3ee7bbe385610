"""Prepared directories for the tests of this room, made by the stage's own function on the session's Ray."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare.stage import prepare_directory

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "猫",
    "坐在",
    "垫子",
    "上",
    "🙂",
    "naïve",
    "<|endoftext|>",
    "\t",
    "tab",
    "",
    "two-spaces",
    "isn't",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of a few words, with Chinese, emoji, and what looks like a special token."""
    draw = random.Random(seed)
    return [f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(3, 30))) for number in range(count)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """``rows``, an object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def documents_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents as JSONL."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    return write_jsonl(path, [{"text": text} for text in sentences(300)])


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pairs as JSONL, every second one with a passage."""
    rows = [
        {
            "prompt": f"What is item {number}?",
            "answer": f"Item {number} is <|user|> number {number}.",
            "context": f"Passage on item {number}. " + "More words follow here. " * 12 if number % 2 else None,
        }
        for number in range(120)
    ]
    return write_jsonl(tmp_path_factory.mktemp("text") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def prepared_documents(ray_instance, documents_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``documents_file`` with a small BPE vocabulary."""
    directory = tmp_path_factory.mktemp("prepared") / "documents"
    data = DataSection(train=str(documents_file), validation_fraction=0.2)
    prepare_directory(directory, data, TokenizerSection(type="bpe", vocab_size=400))
    return directory


@pytest.fixture(scope="session")
def prepared_pairs(ray_instance, pairs_file: Path, prepared_documents: Path, tmp_path_factory) -> Path:
    """``pairs_file`` with the tokenizer of ``prepared_documents``."""
    directory = tmp_path_factory.mktemp("prepared") / "pairs"
    data = DataSection(train=str(pairs_file), validation_fraction=0.2, fields={"context": "context"})
    prepare_directory(directory, data, TokenizerSection(path=str(prepared_documents)))
    return directory
