"""What models are trained and used for. A task knows neither Ray nor parallelism."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from raylm.config.distillation import DistillationSection
from raylm.config.families import ENCODERS, FAMILIES
from raylm.config.model import ObjectiveSection
from raylm.config.tasks import TASKS, tasks_of
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.tasks.base import Task
    from raylm.tasks.objective import Objective


def find_task(name: str) -> Task:
    """The record of a task by its name, one of :data:`raylm.config.tasks.TASKS`."""
    return importlib.import_module(f"raylm.tasks.{name}").TASK


def all_tasks() -> list[Task]:
    """The records of all tasks."""
    return [find_task(name) for name in TASKS]


def task_of(config: PretrainedConfig) -> Task:
    """What a model of this configuration is for: the task of its head, of an encoder without one embedding."""
    for task in all_tasks():
        if task.head.is_named_in(config):
            return task
    if config.is_encoder_decoder:
        return find_task("span")
    return find_task("embedding" if config.model_type in ENCODERS else "causal")


def make_objective(
    section: ObjectiveSection, model_type: str, distillation: DistillationSection | None = None
) -> Objective:
    """The objective of ``section`` for a model of transformers' ``model_type``; auto is the family's own.

    Args:
        distillation: what the model learns from a teacher, where it has one.

    Raises:
        UserError: a model of that type cannot be trained so.
    """
    encoder = model_type in ENCODERS
    family = FAMILIES.get(model_type)
    tasks = family.tasks if family else ("masked",) if encoder else ("causal",)
    allowed = tasks_of(tasks, encoder=encoder)
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
    made = objective(section)
    made.distillation = distillation
    return made
