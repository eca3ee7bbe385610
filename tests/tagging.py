"""Sentences whose words have tags: who lives where, and where somebody works."""

from __future__ import annotations

import random
from pathlib import Path

from tests.reading import JOBS, NAMES, TOWNS


def tagged_rows(count: int, seed: int, scheme: str = "bio") -> list[tuple[list[str], list[str]]]:
    """Tokens and tags: persons of one or two names, towns, and jobs, which are outside."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        person = [name.title() for name in draw.sample(NAMES, draw.choice((1, 2)))]
        if draw.random() < 0.5:
            parts = [(person, "PER"), (["lives", "in"], None), ([draw.choice(TOWNS).title()], "LOC"), (["."], None)]
        else:
            parts = [(person, "PER"), (["works", "as", "a", draw.choice(JOBS)], None), (["."], None)]
        found.append(
            (
                [word for words, _ in parts for word in words],
                [tag for words, kind in parts for tag in _tags(len(words), kind, scheme)],
            )
        )
    return found


def _tags(count: int, kind: str | None, scheme: str) -> list[str]:
    if kind is None:
        return ["O"] * count
    if scheme == "none":
        return [kind] * count
    if scheme == "bioes":
        return [f"S-{kind}"] if count == 1 else [f"B-{kind}", *[f"I-{kind}"] * (count - 2), f"E-{kind}"]
    return [f"B-{kind}", *[f"I-{kind}"] * (count - 1)]


def write_columns(path: Path, rows: list[tuple[list[str], list[str]]]) -> Path:
    """A column file: a document's line, then a word and its tag on each line."""
    sentences = ["\n".join(f"{word} {tag}" for word, tag in zip(*row, strict=True)) for row in rows]
    path.write_text("-DOCSTART- O\n\n" + "\n\n".join(sentences) + "\n", encoding="utf-8")
    return path
