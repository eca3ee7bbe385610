"""Classification: say which class a text belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raylm.models.encoders import encoder_positions, label_names, scores_are_probabilities
from raylm.models.heads import CLASSIFIER
from raylm.tasks.base import Evaluation, Measure, Service, Task
from raylm.tasks.classification.objective import ClassificationObjective
from raylm.tasks.classification.texts import describe, open_texts
from raylm.tasks.closeness import label_agreement

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.config.serving import ServingSection


def _settings(source: str, config: PretrainedConfig, serving: ServingSection) -> dict[str, Any]:
    return {
        "context_length": encoder_positions(config),
        "labels": label_names(config),
        "sigmoid": scores_are_probabilities(config),
    }


TASK = Task(
    name="classification",
    head=CLASSIFIER,
    objective=ClassificationObjective,
    evaluation=Evaluation(
        open=open_texts,
        measures=(
            Measure("accuracy", "accuracy, %", "larger", 2),
            Measure("macro_f1", "macro-F1, %", "larger", 2),
        ),
        closeness=label_agreement,
        unit="texts",
        results="predictions.jsonl",
        describe=describe,
    ),
    service=Service(
        name="classification",
        what="a classifier",
        route="classify",
        example={"model": "", "input": ["What a fine day."]},
        settings=_settings,
    ),
)
