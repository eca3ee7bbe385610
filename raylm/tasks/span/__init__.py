"""Span corruption: an encoder reads a text with gaps, a decoder writes what stood in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylm.errors import UserError
from raylm.models.heads import SEQUENCE_TO_SEQUENCE
from raylm.tasks.base import Evaluation, Measure, Service, Task
from raylm.tasks.span.gaps import closeness, describe, open_gaps
from raylm.tasks.span.objective import SpanObjective

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from raylm.config.serving import ServingSection


def _refuse(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, serving: ServingSection, path: str) -> None:
    raise UserError(
        f"model.path: found {path}, a sequence-to-sequence model, which is not served; allowed: a text generator, a "
        "reader, a classifier or another encoder"
    )


TASK = Task(
    name="span",
    head=SEQUENCE_TO_SEQUENCE,
    objective=SpanObjective,
    evaluation=Evaluation(
        open=open_gaps,
        measures=(Measure("gap_loss", "loss, nats a target", "smaller", 4),),
        closeness=closeness,
        unit="windows",
        results="gaps.jsonl",
        describe=describe,
    ),
    service=Service(
        name="span",
        what="a sequence-to-sequence model",
        route="completions",
        example={"model": "", "prompt": "The", "max_tokens": 32},
        check=_refuse,
    ),
)
