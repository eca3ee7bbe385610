"""Embedding: texts to vectors, by an encoder without a head. Nothing is trained for it here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config.stages import CompressConfig, EvaluateConfig
from raylm.data.loading import load_tokenizer
from raylm.data.padding import encoder_batch
from raylm.data.samples.evaluation_texts import evaluation_texts
from raylm.data.samples.labelled import encode_texts
from raylm.errors import UserError
from raylm.models.encoders import encoder_positions, sentence_length
from raylm.models.heads import NONE
from raylm.models.loading import load_config
from raylm.tasks.base import Batches, Evaluation, Service, Task, by_length
from raylm.tasks.closeness import mean_cosine

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from raylm.config.serving import ServingSection

DEFAULT_LENGTH = 384
MOST_TEXTS = 256


class EmbeddedTexts:
    """Texts as one encoder's tokens; see :class:`raylm.tasks.base.ScoredSet`. They have no figures of quality."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, batch_size: int) -> None:
        self.count, self.length, self.vocabulary_size = len(texts), length, len(tokenizer)
        ids, pad_id = encode_texts(tokenizer, texts, length), tokenizer.pad_token_id or 0
        numbers = by_length([len(row) for row in ids], batch_size)
        self.batches = Batches(numbers, lambda batch: encoder_batch([ids[number] for number in batch], pad_id, length))

    def figures(self, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
        """None."""
        return {}

    def rows(self, outputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
        """None."""
        return iter(())


def open_embedded(config: EvaluateConfig | CompressConfig, source: str) -> EmbeddedTexts:
    """Some texts of the ``data`` section for the encoder at ``source``.

    Raises:
        UserError: bad input, or texts that are to be longer than the model's positions.
    """
    positions, section = encoder_positions(load_config(source)), config.evaluation
    length = section.sequence_length or min(positions or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if positions is not None and length > positions:
        raise UserError(
            f"evaluation.sequence_length: found {length}, allowed: at most the model's {positions} positions"
        )
    texts = list(itertools.islice(evaluation_texts(config.data, section.split), MOST_TEXTS))
    if not texts:
        raise UserError(f"data: {', '.join(config.data.train_sources)} has no text in the {section.split} split")
    return EmbeddedTexts(texts, load_tokenizer(source), length, section.batch_size)


def _mean(hidden: np.ndarray) -> np.ndarray:
    return hidden.mean(axis=0)


def _settings(source: str, config: PretrainedConfig, serving: ServingSection) -> dict[str, Any]:
    length = sentence_length(Path(source), encoder_positions(config))
    return {"context_length": length, "token_ids": serving.token_ids}


TASK = Task(
    name="embedding",
    head=NONE,
    evaluation=Evaluation(open=open_embedded, measures=(), closeness=mean_cosine(_mean, "vectors"), unit="texts"),
    service=Service(
        name="embedding",
        what="an encoder",
        route="embeddings",
        example={"model": "", "input": ["What a fine day."]},
        settings=_settings,
    ),
)
