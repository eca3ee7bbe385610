"""Learning-rate schedules as pure functions of the step, so that resuming needs no state.

A schedule gives the factor by which the peak learning rate is multiplied: linear warm-up, then cosine (Loshchilov and
Hutter 2017, arXiv:1608.03983), linear, constant, or warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395).
"""

from __future__ import annotations

import math

from raylm.config.training import TrainingSection


def learning_rate_factor(training: TrainingSection, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate for the update that makes step ``step`` + 1 of ``total_steps``."""
    warmup, final = training.warmup_steps, training.final_learning_rate_fraction
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if training.schedule == "constant":
        return 1.0
    if training.schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if training.schedule == "linear":
        return 1 - (1 - final) * progress
    decay_start = total_steps * (1 - training.decay_fraction)
    if step < decay_start:
        return 1.0
    return 1 - (1 - final) * min(1.0, (step - decay_start) / max(1.0, total_steps - decay_start))
