"""Extractive question answering: point at the answer in a context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.data.samples.windows import check_reader_tokenizer
from raylm.models.encoders import encoder_positions
from raylm.models.heads import READER
from raylm.tasks.base import Evaluation, Measure, Service, Task
from raylm.tasks.closeness import mean_cosine
from raylm.tasks.extractive_qa.objective import ExtractiveQaObjective
from raylm.tasks.extractive_qa.questions import check_window, describe, fitted, open_questions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from raylm.config.serving import ServingSection


def _centred(scores: np.ndarray) -> np.ndarray:
    """Scores [T, 2] as one vector, whatever is added to all first or all last ones: no answer depends on that."""
    return (scores - scores.mean(axis=0)).ravel().astype(np.float64)


def _settings(source: str, config: PretrainedConfig, serving: ServingSection) -> dict[str, Any]:
    positions = encoder_positions(config)
    return {"context_length": positions, "reading": fitted(serving.reading, positions)}


def _check(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, serving: ServingSection, path: str) -> None:
    check_window(serving.reading, encoder_positions(config), "serving.reading.sequence_length")
    check_reader_tokenizer(tokenizer, path)


TASK = Task(
    name="extractive_qa",
    head=READER,
    objective=ExtractiveQaObjective,
    evaluation=Evaluation(
        open=open_questions,
        measures=(
            Measure("exact_match", "exact match, %", "larger", 2),
            Measure("f1", "F1, %", "larger", 2),
        ),
        closeness=mean_cosine(_centred, "scores"),
        unit="questions",
        results="answers.jsonl",
        describe=describe,
    ),
    service=Service(
        name="extractive_qa",
        what="a reader",
        route="qa",
        example={"question": "Who has stripes?", "context": "The zebra has stripes. The lion has none."},
        settings=_settings,
        check=_check,
    ),
)
