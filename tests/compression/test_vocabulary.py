"""A smaller vocabulary: the text that it is for is cut as before, logits of its tokens are the same, and it reloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoding
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from raylm.compression import measuring
from raylm.compression.pruning.vocabulary import cut_model, cut_tokenizer, kept_tokens, read_tokenizer, write_tokenizer
from raylm.compression.stage import compress
from raylm.config import load_config
from raylm.errors import UserError
from raylm.models.heads import CAUSAL, MASKED

ALL = [
    "The cat sat on the mat, and the dog lay beside it while it rained for hours and hours.",
    "Numbers such as 1024, 2048 and 4096 are powers of two; naïve façades are not.",
    "def function(argument): return argument + 1  # a comment",
    "猫坐在垫子上。狗躺在旁边。",
] * 3
USED = ["The dog sat on the mat for hours.", "and the cat lay beside it."]


def trained(kind: str, directory: Path) -> Path:
    """A tokenizer of each kind, with some hundred tokens."""
    specials = ["<s>", "</s>", "<unk>", "<pad>"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoding.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=480, special_tokens=specials, initial_alphabet=alphabet)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoding.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoding.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=specials, unk_token="<unk>")
    tokenizer.train_from_iterator(ALL, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    names = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), specials, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_the_text_is_cut_as_before(kind: str, tmp_path: Path) -> None:
    whole = AutoTokenizer.from_pretrained(trained(kind, tmp_path / "whole"))
    given = read_tokenizer(tmp_path / "whole")
    used = sorted({number for text in USED for number in whole(text)["input_ids"]})
    kept = kept_tokens(given, used, [whole.pad_token_id])
    trained(kind, tmp_path / "small")
    write_tokenizer(tmp_path / "small", cut_tokenizer(given, kept), kept)
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(kept) == len(small) < len(whole) and len(kept) % 64 == 0
    for text in USED:
        numbers = small(text)["input_ids"]
        assert [kept[number] for number in numbers] == whole(text)["input_ids"]
        assert small.decode(numbers) == whole.decode(whole(text)["input_ids"])
    for name in ("bos", "eos", "unk", "pad"):
        assert kept[getattr(small, f"{name}_token_id")] == getattr(whole, f"{name}_token_id")
    # Other text is cut into more tokens, and with bytes in the vocabulary nothing of it is lost.
    other = ALL[1]
    assert len(small(other)["input_ids"]) >= len(whole(other)["input_ids"])
    if kind == "bpe":
        assert small.decode(small(other)["input_ids"], skip_special_tokens=True) == other


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_what_stays_are_the_same(tied: bool) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=200, tie_word_embeddings=tied, bos_token_id=5, eos_token_id=[7, 9], **size)
    ).eval()
    kept = [3, 5, 7, 9, *range(20, 80)]
    small = cut_model(model, CAUSAL, kept)
    assert (small.config.vocab_size, small.config.bos_token_id, small.config.eos_token_id) == (64, 1, [2, 3])
    numbers = torch.arange(40)[None]
    with torch.no_grad():
        found, expected = small(numbers).logits, model(torch.tensor(kept)[numbers]).logits[..., kept]
    assert torch.equal(found, expected)
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied


def test_an_encoder_that_predicts_tokens_has_a_bias_for_each() -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=128, **size)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    kept = list(range(0, 128, 2))
    small = cut_model(model, MASKED, kept)
    numbers = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(torch.tensor(kept)[numbers]).logits[..., kept]
        torch.testing.assert_close(small(numbers).logits, expected, atol=1e-6, rtol=0)


def write(directory: Path, steps: list[dict]) -> Path:
    """A Llama with a BPE tokenizer, and text of a part of its tokens."""
    model = trained("bpe", directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **special)).save_pretrained(model)
    (directory / "text.txt").write_text("\n".join(USED * 20))
    (directory / "other.txt").write_text("\n".join(ALL * 5))
    values = {
        "run": {"name": "small", "storage": str(directory)},
        "data": {"train": str(directory / "text.txt"), "text_unit": "line"},
        "model": {"path": str(model)},
        "compression": {
            "prompts": 4, "prompt_tokens": 8, "new_tokens": 4, "steps": steps,
            "outside": {"train": str(directory / "other.txt"), "text_unit": "line"},
        },
        "evaluation": {"sequence_length": 64},
    }  # fmt: skip
    path = directory / "compress.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_a_chain_with_a_smaller_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    steps = [{"prune": {"vocabulary": "used"}}, {"quantize": {"bits": 8}}]
    compress(load_config("compress", write(tmp_path, steps)))
    assert "pruning to the training text's tokens" in capsys.readouterr().out
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    told = report["steps"][0]["vocabulary"]
    assert told["used"] < told["after"] < told["before"] and told["after"] % 64 == 0
    small = report["steps"][0]["figures"]
    assert small["parameters"] == report["before"]["parameters"] - 2 * 64 * (told["before"] - told["after"])
    # Fewer wrong tokens to choose from, and the same ones to say.
    assert small["bits_per_byte"] <= report["before"]["bits_per_byte"] + 1e-6
    # Measured on the same bytes, in more tokens.
    assert small["outside_bits_per_byte"] > 0
    assert "divergence" not in report["after"] and "greedy_agreement" not in report["after"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small" / "model")
    assert model.config.vocab_size == len(tokenizer) == told["after"]
    text = tokenizer.decode(model.generate(**tokenizer("The dog", return_tensors="pt"), max_new_tokens=4)[0])
    assert text.startswith("<s>The dog")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{"prune": {"vocabulary": "used", "layers": 1}}], "layers: leave it out with vocabulary"),
        ([{"prune": {"vocabulary": 100}}], r"prune\.vocabulary: found 100, allowed: .*used"),
        (
            [{"prune": {"vocabulary": "used"}}, {"quantize": {"bits": 4, "group_size": 32}}],
            r"compression\.steps\[1\]: found quantize with samples or training behind prune\.vocabulary",
        ),
    ],
)
def test_refused_before_anything_is_made(tmp_path: Path, steps: list[dict], expected: str) -> None:
    path = write(tmp_path, steps)
    with pytest.raises(UserError, match=expected):
        compress(load_config("compress", path))
    assert not (tmp_path / "small").exists()


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found a tokenizer without tokenizer\.json"):
        read_tokenizer(tmp_path)
