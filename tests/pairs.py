"""Pairs of texts with a rule, in two files, and an encoder-decoder that has learnt nothing: for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WORDS = {
    "river": "fluss", "stone": "stein", "cloud": "wolke", "sings": "singt", "falls": "faellt", "under": "unter",
    "over": "ueber", "quiet": "still", "old": "alt", "tree": "baum", "house": "haus", "bird": "vogel",
}  # fmt: skip


def write_pairs(directory: Path, count: int, seed: int = 0) -> tuple[Path, Path]:
    """Two aligned files of ``count`` lines: words of one language and, in the same order, of another."""
    draw = np.random.default_rng(seed)
    lines = [draw.choice(list(WORDS), draw.integers(2, 7)).tolist() for _ in range(count)]
    source, target = directory / "pairs.en", directory / "pairs.de"
    source.write_text("".join(" ".join(line) + "\n" for line in lines))
    target.write_text("".join(" ".join(WORDS[word] for word in line) + "\n" for line in lines))
    return source, target


def write_model(directory: Path, source: Path, target: Path, **values: object) -> Path:
    """A new T5 of two layers with a word tokenizer of the two files; returns its directory."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from raylm.config.data import TokenizerSection
    from raylm.data.loading import load_tokenizer
    from raylm.data.tokens.tokenizers import make_tokenizer

    made = make_tokenizer(
        TokenizerSection(type="wordpiece", vocab_size=300), iter([source.read_text(), target.read_text()])
    )
    made.save_pretrained(directory)
    tokenizer = load_tokenizer(directory, "tokenizer")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **values,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return directory
