"""A tiny encoder, and labelled texts of three classes, of which one is rare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["river", "mountain", "cloud", "stone", "sings", "falls", "over", "under", "the", "a", "quiet", "old"]
LABELS = ["calm", "loud", "rare"]
SHARES = [0.6, 0.3, 0.1]


def write_encoder(directory: Path, dropout: float = 0.1) -> Path:
    """A BERT of two narrow layers with its tokenizer."""
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=17, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return directory


def write_rows(path: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Texts whose class shows in some of their words only."""
    draw = np.random.default_rng(seed)
    rows = []
    for label in draw.choice(3, count, p=SHARES):
        own = draw.choice(WORDS[4 * label : 4 * label + 4], 4)
        rows.append((" ".join(draw.permutation([*own, *draw.choice(WORDS, 5)])), LABELS[label]))
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return rows


def write_with_module(directory: Path, name: str, text: str) -> None:
    """An encoder, texts to learn from and to measure with, and a module of the user's own."""
    write_encoder(directory / "encoder", dropout=0.0)
    write_rows(directory / "train.csv", 96, 1)
    write_rows(directory / "dev.csv", 16, 2)
    (directory / f"{name}.py").write_text(text)


def write_run(directory: Path, name: str, **sections: dict) -> Path:
    """The file of a finetune run in ``directory`` over ``encoder``, ``train.csv`` and ``dev.csv`` there."""
    values = {
        "run": {"name": name, "storage": str(directory)},
        "data": {"train": str(directory / "train.csv"), "validation": str(directory / "dev.csv")},
        "model": {"path": str(directory / "encoder")},
        "objective": {"type": "classification"},
        "training": {
            "steps": 40, "batch_size": 16, "sequence_length": 16, "learning_rate": 0.003, "log_every_steps": 1,
            "evaluate_every_steps": 5, "schedule": "constant",
        },
    }  # fmt: skip
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
