"""An encoder such as MiniLM as an engine: it reads texts for their hidden states and generates nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from raylm.serving.engines.base import Backend, Event, Generate, Reading


class EncoderBackend(Backend):
    """Serves a loaded encoder.

    Args:
        model: gives ``last_hidden_state``, on the device it is to run on.
    """

    name = "encoder"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(sequences=1)
        self._model = model.eval()

    def admit(self, request: Generate) -> None:
        raise ValueError("an encoder generates no text")

    def advance(self) -> list[Event]:
        return []

    def drop(self, number: int) -> None:
        pass

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Reading:
        """Read a whole text in one pass."""
        input_ids = torch.tensor([ids], device=self._model.device)
        return _EncoderReading(self._model(input_ids=input_ids).last_hidden_state[0])


class _EncoderReading(Reading):
    """Last hidden states [tokens, hidden size] of one text."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._hidden = hidden

    def logits(self) -> Iterator[np.ndarray]:
        raise ValueError("an encoder gives no probabilities")

    def hidden(self) -> np.ndarray:
        return self._hidden.float().cpu().numpy()
