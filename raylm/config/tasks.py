"""The tasks by name, and what a YAML file has to know of each; what a task does is in ``raylm/tasks/NAME.py``.

Another task is a line here and that file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskNeeds:
    """What a task asks of the other sections.

    Attributes:
        tokenizer: keys of ``tokenizer`` that a new tokenizer needs, with the value where the file gives none.
        trains_encoders: whether any encoder that exists can be trained on it further; else it is for the families
            whose own task it is.
        trains_generators: whether any text generator that exists can be trained on it further.
        packs_documents: whether ``objective.document_boundaries`` has a meaning for it.
        is_trained: whether ``objective.type`` may name it.
    """

    tokenizer: dict[str, Any] = field(default_factory=dict)
    trains_encoders: bool = False
    trains_generators: bool = False
    packs_documents: bool = False
    is_trained: bool = True


TASKS = {
    "causal": TaskNeeds(packs_documents=True),
    "masked": TaskNeeds(tokenizer={"mask_token": True}),
    # As many sentinels as T5 has.
    "span": TaskNeeds(tokenizer={"sentinels": 100}),
    "sequence_to_sequence": TaskNeeds(),
    "extractive_qa": TaskNeeds(trains_encoders=True),
    "classification": TaskNeeds(trains_encoders=True),
    "tagging": TaskNeeds(trains_encoders=True),
    "preference": TaskNeeds(trains_generators=True),
    "embedding": TaskNeeds(is_trained=False),
}
TRAINED_TASKS = tuple(name for name, needs in TASKS.items() if needs.is_trained)


def tasks_of(own: tuple[str, ...], *, encoder: bool) -> tuple[str, ...]:
    """What a model can be trained on: the ``own`` tasks of its family, and of an encoder or a text generator those for
    any."""
    generator = "causal" in own
    return own + tuple(
        name
        for name, needs in TASKS.items()
        if (encoder and needs.trains_encoders) or (generator and needs.trains_generators)
    )
