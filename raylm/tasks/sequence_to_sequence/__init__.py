"""Pairs of texts: read one, write another, as in translation and summarisation."""

from __future__ import annotations

from raylm.models.heads import SEQUENCE_TO_SEQUENCE
from raylm.models.pairs import open_pair_model
from raylm.tasks.base import WRITING, Evaluation, Measure, Task
from raylm.tasks.sequence_to_sequence.objective import SequenceToSequenceObjective
from raylm.tasks.sequence_to_sequence.pairs import closeness, describe, open_pairs

TASK = Task(
    name="sequence_to_sequence",
    head=SEQUENCE_TO_SEQUENCE,
    objective=SequenceToSequenceObjective,
    evaluation=Evaluation(
        open=open_pairs,
        measures=(
            Measure("bleu", "BLEU", "larger", 2),
            Measure("chrf", "chrF", "larger", 2),
            Measure("rouge1", "ROUGE-1, %", "larger", 2),
            Measure("rouge2", "ROUGE-2, %", "larger", 2),
            Measure("rouge_l", "ROUGE-L, %", "larger", 2),
            Measure("target_loss", "loss, nats a token of references", "smaller", 4),
        ),
        closeness=closeness,
        unit="pairs",
        results="translations.jsonl",
        describe=describe,
        open_model=open_pair_model,
    ),
    service=WRITING,
)
