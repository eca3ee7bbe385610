"""What models are trained and used for. A task knows neither Ray nor parallelism."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from raylm.config.distillation import DistillationSection
from raylm.config.families import ENCODERS, FAMILIES
from raylm.config.model import ObjectiveSection
from raylm.config.tasks import TASKS, tasks_of
from raylm.errors import UserError
from raylm.models.encoder_decoders import source_prefix
from raylm.models.own_heads import is_import_path, with_own_head
from raylm.tasks.own_loss import load_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.tasks.base import Task
    from raylm.tasks.objective import Objective

# Types of encoder-decoders that were trained on span corruption and have its sentinels.
FILL_GAPS = ("t5", "mt5", "umt5", "longt5")


def find_task(name: str) -> Task:
    """The record of a task by its name, one of :data:`raylm.config.tasks.TASKS`."""
    return importlib.import_module(f"raylm.tasks.{name}").TASK


def all_tasks() -> list[Task]:
    """The records of all tasks."""
    return [find_task(name) for name in TASKS]


def task_of(config: PretrainedConfig) -> Task:
    """What a model of this configuration is for: the task of its head, of an encoder without one embedding, of an
    encoder-decoder what it says."""
    for task in all_tasks():
        if task.head.is_named_in(config):
            return task
    if config.is_encoder_decoder:
        # A model for pairs says so; T5 and its relatives fill gaps unless they do, which others have no tokens for.
        fills_gaps = config.model_type in FILL_GAPS and source_prefix(config) is None
        return find_task("span" if fills_gaps else "sequence_to_sequence")
    return find_task("embedding" if config.model_type in ENCODERS else "causal")


def chosen_task(config: PretrainedConfig, section: ObjectiveSection, *, measured: bool = False) -> Task:
    """What a model is taken for: what ``objective.type`` names among the tasks of its head, else what it says itself.

    Args:
        measured: it is only measured: a next-token model can be taken for one that writes an answer to a text.
    """
    found = task_of(config)
    if section.type == "auto":
        return found
    named = find_task(section.type)
    writes = measured and named.name == "sequence_to_sequence" and found.name == "causal"
    return named if named.head == found.head or writes else found


def _own_tasks(model_type: str) -> tuple[str, ...]:
    """What models of that type are trained on, the default first, beside the tasks of any encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    if (family := FAMILIES.get(model_type)) is not None:
        return family.tasks
    if model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return ("sequence_to_sequence",)
    return ("masked",) if model_type in ENCODERS else ("causal",)


def make_objective(
    section: ObjectiveSection, model_type: str, distillation: DistillationSection | None = None
) -> Objective:
    """The objective of ``section`` for a model of transformers' ``model_type``; auto is the family's own.

    Args:
        distillation: what the model learns from a teacher, where it has one.

    Raises:
        UserError: a model of that type cannot be trained so, or there is no such loss or head.
    """
    encoder = model_type in ENCODERS
    allowed = tasks_of(_own_tasks(model_type), encoder=encoder)
    name = allowed[0] if section.type == "auto" else section.type
    if name not in allowed:
        raise UserError(f"objective.type: found '{name}', allowed for a {model_type} model: {', '.join(allowed)}")
    if not TASKS[name].packs_documents and section.document_boundaries != "ignore":
        raise UserError(
            f"objective.document_boundaries: found {section.document_boundaries}, allowed with objective.type {name}: "
            "ignore"
        )
    objective = find_task(name).objective
    assert objective is not None
    for key, wanted, follows in (
        ("label_smoothing", bool(section.label_smoothing), objective.smooths_labels),
        ("class_weights", section.class_weights is not None, objective.weighs_classes),
        ("loss", section.loss is not None, objective.takes_loss),
    ):
        if wanted and not follows:
            raise UserError(f"objective.{key}: leave it out; objective.type {name} has no place for it")
    own = is_import_path(section.head)
    if not (objective.head.takes_own if own else section.head in objective.plain_heads):
        allowed_heads = [*objective.plain_heads, *(["module:attribute"] if objective.head.takes_own else [])]
        raise UserError(
            f"objective.head: found {section.head}, allowed with objective.type {name}: {', '.join(allowed_heads)}"
        )
    made = objective(section)
    made.head = with_own_head(made.head, section)
    made.distillation = distillation
    if section.loss is not None:
        made.own_loss = load_loss(section)
    return made
