from __future__ import annotations

import math

import pytest
from transformers import AutoTokenizer

from raylm.config.data import TokenizerSection
from raylm.data.tokens.encoding import load_backend
from raylm.data.tokens.tokenizer_statistics import describe_vocabulary
from raylm.data.tokens.tokenizers import make_tokenizer, tokenizer_hash

ENGLISH = ["the cat sat on the mat, and the dog sat on the log.", "a cat is not a dog"] * 20
CHINESE = ["我们在图书馆里看书。", "他们明天去北京大学。", "北京大学在北京。ab 12"] * 20
KINDS = {
    "wordpiece": TokenizerSection(type="wordpiece", vocab_size=60),
    "unigram": TokenizerSection(type="unigram", vocab_size=60),
    "word": TokenizerSection(type="word", vocab_size=14),
    "jieba": TokenizerSection(type="word", segmenter="jieba", vocab_size=60),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_reproducible_and_reloads(kind, tmp_path):
    texts = CHINESE if kind == "jieba" else ENGLISH
    for name in ("one", "two"):
        made = make_tokenizer(KINDS[kind], iter(texts))
        made.save_pretrained(tmp_path / name)
    assert tokenizer_hash(tmp_path / "one") == tokenizer_hash(tmp_path / "two")
    assert len(made) <= KINDS[kind].vocab_size
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"]) == [0, 1, 2, 3]
    ids = tokenizer(texts[0])["input_ids"]
    assert ids == load_backend(tmp_path / "one").encode(texts[0]).ids
    if kind != "word":
        # Its small vocabulary leaves rare words out.
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ,", ",").replace(" .", ".") == texts[0]
    assert tokenizer.unk_token_id in tokenizer("日本 zebra ☃")["input_ids"]


def test_words_are_whole():
    word = make_tokenizer(KINDS["word"], iter(ENGLISH))
    assert word.backend.encode("the cat sat").tokens[:3] == ["the", "cat", "sat"] and word.backend.encode(
        "elephant"
    ).tokens == ["<|unk|>"]
    jieba = make_tokenizer(KINDS["jieba"], iter(CHINESE))
    assert jieba.backend.encode("我们在北京大学看书").tokens == ["我们", "在", "北京大学", "看书"]
    # A word that was never seen comes apart into characters.
    assert jieba.backend.encode("京北").tokens == ["京", "北"]


def test_vocabulary_report(tmp_path):
    tokenizer = make_tokenizer(TokenizerSection(type="character"), iter(["abcd "]))
    tokenizer.save_pretrained(tmp_path)
    found = describe_vocabulary(tmp_path, ["ab cd", "xx"], tokenizer.unk_token_id)
    assert (found["text_bytes"], found["tokens"], found["bytes_per_token"]) == (7, 7, 1.0)
    assert found["fertility"] == round(7 / 3, 4) and found["unknown_rate"] == round(2 / 7, 6)
    shares = [1 / 7] * 5 + [2 / 7]
    assert found["unigram_entropy_bits"] == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-4)
    assert found["used"] == 0.6
    assert describe_vocabulary(tmp_path, [], None) == {}
