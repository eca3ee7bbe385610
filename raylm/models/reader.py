"""Extractive readers: a Hugging Face directory with a question answering head, and scores for windows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raylm.errors import UserError
from raylm.models.loading import load_config, load_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Reader(Protocol):
    """What scores windows, whatever computes it.

    Attributes:
        name: of the engine.
    """

    name: str

    def logits(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """A batch of :func:`raylm.data.windows.pad` to scores fp32 [n, T, 2] of first and last tokens."""


def is_reader(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration has a trained question answering head."""
    return any(name.endswith("ForQuestionAnswering") for name in config.architectures or ())


def check_reader(path: str, key: str = "model.path") -> PretrainedConfig:
    """The configuration of a reader.

    Raises:
        UserError: there is no model, or it is no reader: transformers would put a random head on it.
    """
    config = load_config(path, key)
    if not is_reader(config):
        found = ", ".join(config.architectures or ()) or config.model_type
        raise UserError(
            f"{key}: found {path}, a {found}, allowed: a reader (finetune with objective.type=extractive_qa makes one)"
        )
    return config


class TransformersReader:
    """A reader in fp32 in this process."""

    name = "transformers"

    def __init__(self, path: str, key: str = "model.path") -> None:
        config = check_reader(path, key)
        self._model = load_model(path, key=key, head="extractive_qa").eval()
        self._types = getattr(config, "type_vocab_size", 0) > 1

    def logits(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See :class:`Reader`."""
        import torch

        names = ["input_ids", "attention_mask", *(["token_type_ids"] if self._types else [])]
        with torch.inference_mode():
            output = self._model(**{name: torch.from_numpy(batch[name]) for name in names})
            return torch.stack([output.start_logits, output.end_logits], dim=-1).float().numpy()


def reader_positions(config: Any) -> int | None:
    """Most tokens of a window, or None where the model has no limit; RoBERTa counts from behind the padding token."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        return positions - (config.pad_token_id or 0) - 1
    return positions
