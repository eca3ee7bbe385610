"""What steps of ``compress`` share that train: how long, and what the model learns from."""

from __future__ import annotations

from raylm.config.base import Section
from raylm.config.distillation import DistillationSection
from raylm.config.training import TrainingSection


class RecoverySection(Section):
    """Training that wins back what a step cost."""

    training: TrainingSection
    """As in the stage finetune."""
    distillation: DistillationSection = DistillationSection()
    """What the model learns from; by default the original model's logits."""
