"""Sequences of several lengths to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Batches are padded to multiples of this, so that fewer shapes come up.
MULTIPLE = 8


def padded_length(longest: int, most: int | None = None, multiple: int = MULTIPLE) -> int:
    """``longest`` rounded up to a multiple, at most to ``most``, and never below ``longest``."""
    rounded = -(-longest // multiple) * multiple
    return rounded if most is None else max(longest, min(rounded, most))


def pad_right(rows: Sequence[Any], length: int, filler: int | bool = 0) -> np.ndarray:
    """``rows``, each [T] of its own length, as one array [n, length], filled up with ``filler`` on the right.

    bool for a ``filler`` that is bool, else int64.
    """
    padded = np.full((len(rows), length), filler, dtype=bool if isinstance(filler, bool) else np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def encoder_batch(
    ids: Sequence[Any],
    pad_id: int,
    most: int | None = None,
    types: Sequence[Any | None] | None = None,
    multiple: int = MULTIPLE,
) -> dict[str, np.ndarray]:
    """Token ids, each [T], as one batch for an encoder, padded on the right to a multiple of some number of tokens.

    Args:
        most: tokens that it is padded to at most.
        types: the token types of each row, None for a row where all are 0; by default all are.

    Returns:
        input_ids, token_type_ids, attention_mask: int64 [n, length].
    """
    length = padded_length(max(map(len, ids)), most, multiple)
    types = types or [None] * len(ids)
    return {
        "input_ids": pad_right(ids, length, pad_id),
        "token_type_ids": pad_right([() if row is None else row for row in types], length),
        "attention_mask": pad_right([np.ones(len(row), dtype=np.int64) for row in ids], length),
    }
