"""A corpus of any size for benchmarks: real documents with real edits, so that it neither compresses to nothing nor is
all duplicates.

Each document is one of the embedded corpus (or a paragraph of a file) some of whose words were replaced by words of
others; every tenth repeats an earlier one, half of these word for word.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

DUPLICATE_SHARE = 0.1


def base_documents(text: Path | None = None) -> list[str]:
    """Documents to edit: paragraphs of ``text``, or the embedded ones, of 200 characters or more."""
    if text is not None:
        found = text.read_text(encoding="utf-8").split("\n\n")
        joined = ["\n\n".join(found[start : start + 8]) for start in range(0, len(found), 8)]
        return [document for document in joined if len(document) >= 200]
    from raylm.data.stdlib import stdlib_documents

    return [document.text for document in stdlib_documents() if len(document.text) >= 200]


def edit(text: str, share: float, words: list[str], draw: random.Random) -> str:
    """``text`` with about this share of its words replaced, layout kept."""
    pieces = text.split(" ")
    for place in draw.sample(range(len(pieces)), max(1, int(share * len(pieces)))):
        pieces[place] = draw.choice(words)
    return " ".join(pieces)


def write_corpus(path: Path, size: int, seed: int = 0, text: Path | None = None) -> int:
    """Write about ``size`` bytes as JSONL; returns the number of documents."""
    draw = random.Random(seed)
    base = base_documents(text)
    words = [word for document in base for word in document.split(" ") if word]
    recent: list[str] = []
    written = count = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            if recent and draw.random() < DUPLICATE_SHARE:
                document = draw.choice(recent)
                if draw.random() < 0.5:
                    document = edit(document, 0.01, words, draw)
            else:
                document = edit(draw.choice(base), draw.uniform(0.2, 0.5), words, draw)
                recent.append(document)
                if len(recent) > 2000:
                    recent.pop(0)
            written += stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            count += 1
    return count
