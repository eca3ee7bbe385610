"""Learning-rate schedules as pure functions of the step, so that resuming needs no state.

A schedule gives the factor by which the peak learning rate is multiplied: linear warm-up, then cosine (Loshchilov and
Hutter 2017, arXiv:1608.03983), linear, polynomial, constant, or warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395);
or one cycle (Smith 2018, arXiv:1803.09820), which moves the momentum, too. Plateau alone has a state, its factor
(:mod:`raylm.training.loop.best`).
"""

from __future__ import annotations

import math

import torch

from raylm.config.training import TrainingSection


def learning_rate_factor(training: TrainingSection, step: int, total_steps: int, plateau: float = 1.0) -> float:
    """Factor of the peak learning rate for the update that makes step ``step`` + 1 of ``total_steps``.

    Args:
        plateau: factor that the schedule plateau has come to.
    """
    warmup, final = training.warmup_steps, training.final_learning_rate_fraction
    if training.schedule == "one_cycle":
        cycle = training.one_cycle
        return _one_cycle(training, step, total_steps, (cycle.first_fraction, 1.0, cycle.last_fraction))
    if step < warmup:
        return (step + 1) / (warmup + 1) * plateau
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if training.schedule == "plateau":
        return plateau
    if training.schedule == "constant":
        return 1.0
    if training.schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if training.schedule == "linear":
        return 1 - (1 - final) * progress
    if training.schedule == "polynomial":
        return final + (1 - final) * (1 - progress) ** training.power
    decay_start = total_steps * (1 - training.decay_fraction)
    if step < decay_start:
        return 1.0
    return 1 - (1 - final) * min(1.0, (step - decay_start) / max(1.0, total_steps - decay_start))


def scheduled_momentum(training: TrainingSection, step: int, total_steps: int) -> float | None:
    """Momentum, or first beta of AdamW, for the same update; None where it stays as it is."""
    moves = training.schedule == "one_cycle" and training.one_cycle.momentum is not None
    # Plain SGD keeps none, and its checkpoints have no room for any.
    if not moves or (training.optimizer == "sgd" and training.momentum == 0):
        return None
    lowest, highest = training.one_cycle.momentum
    return _one_cycle(training, step, total_steps, (highest, lowest, highest))


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Have the optimizer's next step take ``momentum``."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        if "momentum" in group:
            group["momentum"] = momentum


def _one_cycle(training: TrainingSection, step: int, total_steps: int, values: tuple[float, float, float]) -> float:
    """From the first of ``values`` to the second and on to the third, along half cosines, as torch's OneCycleLR."""
    top, last = training.one_cycle.rise_fraction * total_steps - 1, total_steps - 1
    if top > 0 and step <= top:
        begin, end, progress = values[0], values[1], step / top
    else:
        # Of one or two steps nothing rises.
        begin, end, progress = values[1], values[2], min(1.0, (step - max(top, 0.0)) / max(1e-9, last - max(top, 0.0)))
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * progress))
