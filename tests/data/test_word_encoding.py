from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from raylm.data.tokens import word_encoding
from raylm.data.tokens.word_encoding import WordEncoder, applies_to

PROSE = "It isn't so: we've 2,000 words' worth,  don't we?\n\n\tNaïve café — “quoted” 中文，没有空格。１２ x²\u3000y "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([PROSE, Path(__file__).read_text(encoding="utf-8")] * 3, trainer)
    backend.encode_special_tokens = True
    return backend


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in texts]


def found(encoder: WordEncoder, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoder.encode(texts)]


def test_ids_are_those_of_the_library(tokenizer):
    draw = random.Random(0)
    pieces = [
        *" \t\n\r\v\f\x1c\x1f\x85\xa0\u2028\u3000'’.,!1²五\u0301\u200b\x00🙂aé中ёÅ",
        "'s",
        "'re",
        " the",
        "<|endoftext|>",
    ]
    texts = [PROSE, "", " ", *("".join(draw.choices(pieces, k=20)) for _ in range(1500))]
    # Each character of the ranges, in the midst of others.
    codes = [code for first, last in word_encoding._RANGES for code in range(first, last + 1)]
    codes = [code for code in codes if code < 0x4E00 or code % 16 == 0]
    draw.shuffle(codes)
    for start in range(0, len(codes), 50):
        texts.append("".join(draw.choice("a1 .\n") + chr(code) + draw.choice("b2 !\t") for code in codes[start:][:50]))
    encoder = WordEncoder(tokenizer, 0)
    assert found(encoder, texts) == expected(tokenizer, texts)
    # From the table alone, too.
    assert found(encoder, texts) == expected(tokenizer, texts)


def test_long_texts_and_a_full_table(tokenizer, monkeypatch):
    monkeypatch.setattr(word_encoding, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(word_encoding, "MOST_WORDS", 20)
    texts = [PROSE * 40, "short", "x" * 5000, "words and words " * 500]
    assert found(WordEncoder(tokenizer, 0), texts) == expected(tokenizer, texts)


def test_other_tokenizers_are_left_to_the_library(tokenizer):
    assert applies_to(tokenizer)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.Lowercase()
    assert not applies_to(other)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not applies_to(other)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["whole words"])
    assert not applies_to(other)
