"""Keys that a member of a population may change within its training (``tuning.scheduler: pbt``).

A member takes over the weights, the moments and the place in the data of another and goes on with other values: what
decides the shape of any of these has to stay.
"""

from __future__ import annotations

from collections.abc import Mapping

from raylm.config.distributions import Distribution
from raylm.config.training import TrainingSection

# Single keys, and sections of which every key may.
MAY_CHANGE_WITHIN = (
    "training.learning_rate",
    "training.matrix_learning_rate",
    "training.momentum",
    "training.betas",
    "training.epsilon",
    "training.weight_decay",
    "training.schedule",
    "training.warmup_steps",
    "training.decay_fraction",
    "training.power",
    "training.one_cycle",
    "training.plateau",
    "training.final_learning_rate_fraction",
    "training.dropout",
    "training.gradient_clipping",
    "objective.label_smoothing",
    "objective.class_weights",
    "objective.loss",
    "objective.loss_options",
    "objective.beta",
    "adapter.dropout",
    "distillation.temperature",
    "distillation.logits",
    "distillation.targets",
)
# Why others may not: by key, or by section.
_STAY = {
    "training.steps": "members are compared at the same steps",
    "training.tokens": "members are compared at the same steps",
    "training.epochs": "members are compared at the same steps",
    "training.batch_size": "the place in the data follows from it",
    "training.sequence_length": "the place in the data follows from it",
    "training.group_by_length": "the place in the data follows from it",
    "training.optimizer": "each optimizer keeps moments of its own",
    "training.ema": "the moving average goes over from member to member as it is",
    "training.precision": "members go on in the processes and the layout of others",
    "training.compile": "members go on in the processes and the layout of others",
    "objective": "the samples, or what the model computes, would change",
    "adapter": "the shape or the scale of what was trained would change",
    "freezing": "it decides which weights have moments",
    "parallel": "members go on in the processes and the layout of others",
    "distillation": "what the teacher is asked for would change",
    "rounding": "it changes what the weights mean",
    "model.path": "members go on with each other's weights",
}


def within_refusal(space: Mapping[str, Distribution]) -> str:
    """Why a key of the ``space`` cannot change within training, in words for a message; empty where all can."""
    for key in space:
        if any(key == place or key.startswith(f"{place}.") for place in MAY_CHANGE_WITHIN):
            continue
        places = [key.rpartition(".")[0] if depth else key for depth in range(2)]
        why = next((_STAY[place] for place in [*places, key.partition(".")[0]] if place in _STAY), "")
        section = key.partition(".")[0]
        allowed = [place for place in MAY_CHANGE_WITHIN if place.startswith(f"{section}.")] or MAY_CHANGE_WITHIN
        return (
            f"space: found '{key}' with scheduler pbt, which cannot change within training"
            f"{': ' if why else ''}{why}; allowed: {', '.join(allowed)}"
        )
    return ""


def population_refusal(space: Mapping[str, Distribution], training: TrainingSection, turn: int, trials: int) -> str:
    """Why these members cannot take turns with this training, in words for a message; empty where they can.

    Args:
        turn: evaluations of a turn.
        trials: members that ``tuning.budget`` leaves.
    """
    if trials < 2:
        return f"tuning.budget.trials: found {trials}, allowed with tuning.scheduler pbt: 2 or more members"
    every = training.evaluate_every_steps
    if every is None:
        return "training.evaluate_every_steps: missing; tuning.scheduler pbt compares members at evaluations"
    if training.steps is not None and turn * every >= training.steps:
        return (
            f"tuning.perturbation_evaluations: found {turn}, a turn of {turn * every} steps, allowed with "
            f"training.steps {training.steps}: turns that are shorter than the training"
        )
    if training.early_stopping is not None:
        return "training.early_stopping: leave it out with tuning.scheduler pbt, whose members all train equally long"
    if training.restore_best is True:
        return (
            "training.restore_best: found true, allowed with tuning.scheduler pbt: auto, false; a member's best "
            "evaluation may have been of weights that it gave up"
        )
    momentum = space.get("training.momentum")
    if momentum is not None and training.optimizer == "sgd" and (momentum.has(0) or momentum.has(0.0)):
        return (
            "tuning.space: found 'training.momentum' from 0 on with training.optimizer sgd and tuning.scheduler pbt, "
            "allowed: above 0; without momentum sgd keeps no moments for others to take over"
        )
    return ""
