"""Rows that decode together: their keys and values in one left-padded cache that rows join and leave.

All rows end at the same column, so a step appends one column to every row; what lies left of a row's own text is
padding, zero in ``mask``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def plain_cache() -> DynamicCache:
    """An empty cache that keeps every position, also for models with a sliding window (their mask cuts it)."""
    return DynamicCache()


def left_pad(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of ``prompts``, both int64 [rows, longest]; padding is id 0 under mask 0."""
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return input_ids, mask


class Rows:
    """Requests in decoding.

    Attributes:
        numbers: the request of each row.
        cache: keys and values, each [rows, heads, columns, size] a layer.
        mask: int64 [rows, columns], 1 where a row has text.
        last_tokens: int64 [rows, 1], sampled but not yet read by the model.
    """

    def __init__(
        self,
        numbers: list[int] | None = None,
        cache: DynamicCache | None = None,
        mask: torch.Tensor | None = None,
        last_tokens: torch.Tensor | None = None,
    ) -> None:
        self.numbers = numbers or []
        self.cache = cache
        self.mask = mask
        self.last_tokens = last_tokens

    def grow(self) -> None:
        """Count the column that the model is about to read."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.numbers), 1)], dim=1)

    def keep(self, stays: Callable[[int], bool]) -> None:
        """Drop the rows whose request does not stay, and the columns that are then padding in every row."""
        kept = [row for row, number in enumerate(self.numbers) if stays(number)]
        if len(kept) == len(self.numbers):
            return
        self.numbers = [self.numbers[row] for row in kept]
        if not kept:
            self.cache = self.mask = self.last_tokens = None
            return
        index = torch.tensor(kept)
        self.mask, self.last_tokens = self.mask[index], self.last_tokens[index]
        first = int(self.mask.any(dim=0).to(torch.int8).argmax())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            on_device = index.to(layer.keys.device)
            layer.keys = layer.keys[on_device, :, first:]
            layer.values = layer.values[on_device, :, first:]

    def join(self, other: Rows) -> None:
        """Put the rows of ``other`` below these."""
        if not other.numbers:
            return
        if not self.numbers:
            self.numbers, self.cache = other.numbers, other.cache
            self.mask, self.last_tokens = other.mask, other.last_tokens
            return
        columns = max(self.mask.shape[1], other.mask.shape[1])
        self.numbers = self.numbers + other.numbers
        self.last_tokens = torch.cat([self.last_tokens, other.last_tokens])
        self.mask = torch.cat([_widen(self.mask, columns, 1), _widen(other.mask, columns, 1)])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_widen(mine.keys, columns, 2), _widen(theirs.keys, columns, 2)])
            mine.values = torch.cat([_widen(mine.values, columns, 2), _widen(theirs.values, columns, 2)])


def is_plain(cache: DynamicCache) -> bool:
    """Whether every layer holds nothing but keys and values of every position."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _widen(tensor: torch.Tensor, columns: int, dimension: int) -> torch.Tensor:
    """``tensor`` with zeros put before it, so that ``dimension`` has ``columns`` entries."""
    missing = columns - tensor.shape[dimension]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dimension)
