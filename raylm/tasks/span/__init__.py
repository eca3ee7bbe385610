"""Span corruption: an encoder reads a text with gaps, a decoder writes what stood in them."""

from __future__ import annotations

from raylm.models.heads import SEQUENCE_TO_SEQUENCE
from raylm.tasks.base import WRITING, Evaluation, Measure, Task
from raylm.tasks.span.gaps import closeness, describe, open_gaps
from raylm.tasks.span.objective import SpanObjective

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
    service=WRITING,
)
