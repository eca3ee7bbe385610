"""An encoder as an engine: it reads texts for their scores or hidden states, several together, and generates nothing.

Texts that wait are read in one batch where they are of about one length: padding costs what text costs.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from raylm.data.padding import encoder_batch
from raylm.models.encoders import Encoder
from raylm.serving.engines.base import Backend, Embed, Encode, Event, Generate, Reading, Score

# Texts of one batch, and what padding may add to its tokens.
MOST_TOGETHER = 8
MOST_PADDING = 1.25
# Widths of batches: every new one costs the engine some milliseconds, once.
WIDTH_MULTIPLE = 32


class EncoderBackend(Backend):
    """Serves a loaded encoder.

    Args:
        encoder: reads batches.
        pad_id: fills up short texts.
        most: tokens of a text at most.
    """

    def __init__(self, encoder: Encoder, pad_id: int, most: int | None = None) -> None:
        super().__init__(sequences=MOST_TOGETHER)
        self.name = encoder.name
        self._encoder, self._pad_id, self._most = encoder, pad_id, most

    def admit(self, request: Generate) -> None:
        raise ValueError("this model reads and does not generate text")

    def advance(self) -> list[Event]:
        return []

    def drop(self, number: int) -> None:
        pass

    def read(self, ids: list[int], adapter: str | None = None) -> Reading:
        raise ValueError("this model gives no probabilities of tokens")

    def next_batch(self, waiting: deque[Score | Embed | Encode]) -> list[Encode | Embed]:
        """Take the oldest text of ``waiting``, and others that cost little padding beside it."""
        batch = [waiting.popleft()]
        longest = total = len(batch[0].ids)
        for command in list(waiting):
            if len(batch) == MOST_TOGETHER:
                break
            wider, more = max(longest, len(command.ids)), total + len(command.ids)
            if wider * (len(batch) + 1) <= MOST_PADDING * more:
                batch.append(command)
                waiting.remove(command)
                longest, total = wider, more
        return batch

    def encode(self, batch: list[Encode | Embed]) -> list[np.ndarray]:
        """What the encoder says of each text: scores [T, 2], logits [labels] or [T, labels], or states [T, width]."""
        types = [command.types if isinstance(command, Encode) else None for command in batch]
        ids = [command.ids for command in batch]
        arrays = encoder_batch(ids, self._pad_id, self._most, types, multiple=WIDTH_MULTIPLE)
        outputs = self._encoder.outputs(arrays)
        if outputs.ndim == 2:
            return list(outputs)
        return [row[: len(command.ids)] for command, row in zip(batch, outputs, strict=True)]
