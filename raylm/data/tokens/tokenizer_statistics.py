"""What a tokenizer makes of a text: how many tokens a word and a byte take, what is unknown, how even its use is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from raylm.data.sources.documents import Document
from raylm.data.tokens.encoding import DocumentEncoder, load_backend
from raylm.data.words import words_of

MOST_BYTES = 2 << 20
# Texts that are encoded in one go.
BATCH = 256
FREQUENT, RANKS = 20, 40


def describe_vocabulary(directory: Path, texts: Iterable[str], unknown_id: int | None) -> dict[str, Any]:
    """Measure the tokenizer of ``directory`` on the first two megabytes of ``texts``.

    Returns:
        ``bytes_per_token``; ``characters_per_token``; ``fertility``, tokens a word (a Chinese character is one);
        ``unknown_rate``, share of unknown tokens; ``unigram_entropy_bits``, of the distribution of tokens, and
        ``used``, share of the vocabulary that occurs at all; ``most_frequent`` tokens with their counts; and ``ranks``,
        (rank, count) of tokens in the order of their frequency, at ranks that grow geometrically. Empty where there is
        no text.
    """
    encoder, backend = DocumentEncoder(directory, 0), load_backend(directory)
    size = backend.get_vocab_size()
    counts = np.zeros(size, dtype=np.int64)
    text_bytes = characters = words = 0
    batch: list[Document] = []
    for text in texts:
        batch.append(Document(text=text))
        text_bytes += len(text.encode())
        characters += len(text)
        words += len(words_of(text))
        if text_bytes >= MOST_BYTES:
            break
    for start in range(0, len(batch), BATCH):
        encoded, _ = encoder.encode(batch[start : start + BATCH])
        counts += np.bincount(np.concatenate([ids[:-1] for ids in encoded]), minlength=size)
    tokens = int(counts.sum())
    if not tokens:
        return {}
    shares = counts[counts > 0] / tokens
    order = np.argsort(-counts, kind="stable")[: len(shares)]
    ranks = np.unique(np.geomspace(1, len(order), RANKS).round().astype(int)).tolist()
    return {
        "text_bytes": text_bytes,
        "tokens": tokens,
        "bytes_per_token": round(text_bytes / tokens, 4),
        "characters_per_token": round(characters / tokens, 4),
        "fertility": round(tokens / max(1, words), 4),
        "unknown_rate": round(float(counts[unknown_id] / tokens) if unknown_id is not None else 0.0, 6),
        "unigram_entropy_bits": round(float(-(shares * np.log2(shares)).sum()), 4),
        "used": round(len(shares) / size, 4),
        "most_frequent": [
            {"token": backend.decode([token], skip_special_tokens=False), "count": int(counts[token])}
            for token in order[:FREQUENT].tolist()
        ],
        "ranks": [[rank, int(counts[order[rank - 1]])] for rank in ranks],
    }
