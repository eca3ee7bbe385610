"""From a step number to this rank's micro-batches, and from a validation set to evaluation batches."""

from __future__ import annotations

import math

import numpy as np
import torch

from raylm.config.training import TrainingSection
from raylm.data.samples import Samples
from raylm.objectives.causal import IGNORED
from raylm.parallel.engine import Batch


def total_steps(training: TrainingSection, samples_per_epoch: int) -> int:
    """Optimizer steps of the run, from whichever of steps, tokens and epochs is given."""
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / (training.batch_size * training.sequence_length))
    return max(1, math.ceil(training.epochs * samples_per_epoch / training.batch_size))


def to_tensors(samples: Samples, indices: np.ndarray, device: torch.device) -> Batch:
    """The samples at ``indices`` as tensors (batch, time) on ``device``."""
    return {name: torch.from_numpy(values).to(device) for name, values in samples.batch(indices).items()}


def step_batches(
    samples: Samples,
    step: int,
    batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    device: torch.device,
) -> list[Batch]:
    """This rank's micro-batches of ``step``: a contiguous share of the step's ``batch_size`` sample indices."""
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return [
        to_tensors(samples, np.arange(start, start + micro_batch_size), device)
        for start in range(first, first + share, micro_batch_size)
    ]


def evaluation_batches(
    samples: Samples, limit: int | None, batch_size: int, rank: int, world_size: int, device: torch.device
) -> list[Batch]:
    """This rank's part of the validation set, in as many batches as on every other rank.

    ZeRO 3 communicates in the forward pass, so ranks that run out get batches in which no target counts.
    """
    count = samples.count if limit is None else min(samples.count, limit * batch_size * world_size)
    starts = range(0, count, batch_size)
    mine = list(starts)[rank::world_size]
    batches = [to_tensors(samples, np.arange(s, min(s + batch_size, count)), device) for s in mine]
    while len(batches) < -(-len(starts) // world_size):
        blank = to_tensors(samples, np.arange(1), device)
        blank["targets"].fill_(IGNORED)
        batches.append(blank)
    return batches
