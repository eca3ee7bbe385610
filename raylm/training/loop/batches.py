"""From a step number to this rank's micro-batches, and from a validation set to evaluation batches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from raylm.config.training import TrainingSection
from raylm.data.samples.array_sets import ArraySamples
from raylm.data.samples.token_samples import Samples
from raylm.errors import UserError
from raylm.tasks.objective import IGNORED, Batch, Objective


def training_samples(objective: Objective, directory: Path | str, training: TrainingSection, seed: int) -> Samples:
    """The training samples in a prepared ``directory``, in the order that they are trained on."""
    samples = objective.samples(directory, "train", training.sequence_length, seed)
    if training.group_by_length:
        assert isinstance(samples, ArraySamples)
        samples.group_by_length(training.batch_size)
    return samples


def check_grouping(training: TrainingSection, objective: Objective) -> None:
    """Refuse groups of lengths where samples are windows of text.

    Raises:
        UserError: one line.
    """
    if training.group_by_length and not objective.groups_lengths:
        raise UserError(
            f"training.group_by_length: found true, allowed with objective.type {objective.name}: false, as its "
            "samples are no rows of their own"
        )


def total_steps(training: TrainingSection, samples_per_epoch: int) -> int:
    """Optimizer steps of the run, from whichever of steps, tokens and epochs is given."""
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / (training.batch_size * training.sequence_length))
    return max(1, math.ceil(training.epochs * samples_per_epoch / training.batch_size))


def to_tensors(samples: Samples, indices: np.ndarray, device: torch.device) -> Batch:
    """The samples at ``indices`` as tensors (batch, time) on ``device``."""
    batch = {name: torch.from_numpy(values) for name, values in samples.batch(indices).items()}
    if device.type != "cuda":
        return batch
    # From pinned memory, so that the copy overlaps what the GPU is at; the next kernel that reads it waits for it.
    return {name: values.pin_memory().to(device, non_blocking=True) for name, values in batch.items()}


def step_batches(
    samples: Samples,
    step: int,
    batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    device: torch.device,
) -> list[Batch]:
    """This rank's micro-batches of batch ``step``: a contiguous share of its ``batch_size`` sample indices.

    Every rank has equally many, of equal size; where the batch does not divide, the last ones are filled up with
    sequences in which no target counts.
    """
    indices = rank_samples(step, batch_size, rank, world_size)
    count = micro_batches(batch_size, world_size, micro_batch_size)
    parts = [indices[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
    return [_filled_up(samples, part, micro_batch_size, device) for part in parts]


def rank_samples(step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The sample indices of batch ``step`` that ``rank`` takes."""
    share = -(-batch_size // world_size)
    first, stop = min(rank * share, batch_size), min((rank + 1) * share, batch_size)
    return np.arange(step * batch_size + first, step * batch_size + stop)


def micro_batches(batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-batches of one step on each rank."""
    return -(-batch_size // (world_size * micro_batch_size))


def _filled_up(samples: Samples, indices: np.ndarray, size: int, device: torch.device) -> Batch:
    missing = size - len(indices)
    # Any sample will do as filling.
    batch = to_tensors(samples, np.concatenate([indices, np.zeros(missing, indices.dtype)]), device)
    if missing:
        batch["targets"][-missing:] = IGNORED
    return batch


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
