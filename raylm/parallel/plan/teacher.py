"""What a teacher adds to a plan: each worker holds it whole, beside its share of the model, and passes each batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylm.config.stages import TrainConfig
from raylm.data.loading import resolve_model
from raylm.models.families.build import parameter_count
from raylm.models.loading import load_config
from raylm.parallel.plan.layout import Layout

if TYPE_CHECKING:
    from raylm.parallel.plan.footprint import Work
    from raylm.tasks.objective import Objective

# Of a forward and backward pass, the forward one.
FORWARD = 1 / 3


@dataclass(frozen=True)
class Teacher:
    """A model that only looks.

    Attributes:
        parameters: that a worker holds.
        logits: how many a sequence has, where tokens are predicted; of labels there are few.
        work: of the forward pass of a sequence.
    """

    parameters: int
    logits: int
    work: Work

    def bytes(self, layout: Layout) -> float:
        """On each worker: weights, its logits for a micro-batch, and the gradient that comes with their comparison."""
        size = 2 if layout.bf16 else 4
        return size * (self.parameters + 2.0 * layout.micro_batch_size * self.logits)


def plan_teacher(config: TrainConfig, objective: Objective, *, bf16: bool) -> Teacher | None:
    """The teacher that computes beside the model, if a run has one; reads its configuration alone."""
    from raylm.parallel.plan.footprint import Work
    from raylm.parallel.plan.memory import ModelMemory

    section = config.distillation
    if section is None or section.teacher is None or section.top_k is not None:
        return None
    name = "distillation.teacher"
    teacher = load_config(resolve_model(section.teacher, name), name)
    alone = Layout(1, 1, 1, 0, 1, 1, False, bf16, config.training.optimizer, False)
    (stage,) = ModelMemory(teacher, objective, config.training.sequence_length, bf16=bf16).stages(alone)
    work = stage.work
    return Teacher(
        parameter_count(teacher, objective.head),
        config.training.sequence_length * teacher.vocab_size if objective.predicts_tokens else 0,
        Work(*(FORWARD * part for part in (work.products, work.attention, work.touched, work.operators))),
    )
