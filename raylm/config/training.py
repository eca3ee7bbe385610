"""Sections about optimisation: ``training``, ``parallel`` and ``checkpoint``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raylm.config.base import LARGEST_COUNT, Count, CountFromZero, CountOrAuto, MayChange, Seconds, Section, Total


def _known_form(metric: str) -> str:
    """Whether the task gives the metric is checked where the task is known (``raylm.training.loop.best``)."""
    if metric != "loss" and not re.fullmatch("validation_[a-z][a-z0-9_]*", metric):
        raise ValueError("allowed: loss, validation_loss, or validation_ and the name of a measure of the task")
    return metric


class EarlyStoppingSection(Section):
    """``training.early_stopping``: stop when a metric no longer improves."""

    metric: str = "validation_loss"
    """What must improve: validation_loss, loss (the training loss of the step that is evaluated), or validation_ and a
    measure of the task, such as validation_accuracy. Losses improve by falling, what counts right answers by rising.
    The checkpoint that is kept as the best is so by this metric."""
    patience: Count | None = 3
    """Evaluations in a row without improvement after which training stops; null never stops, and only says by what
    metric the best weights are chosen."""
    minimum_change: float = Field(default=0.0, ge=0, le=1e30)
    """Smallest change that counts as an improvement."""

    _named = field_validator("metric")(_known_form)


class OneCycleSection(Section):
    """``training.one_cycle``: the schedule one_cycle (Smith 2018, arXiv:1803.09820), with cosine phases."""

    rise_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak."""
    first_fraction: float = Field(default=0.04, gt=0, le=1)
    """Learning rate of the first step, as a share of the peak."""
    last_fraction: float = Field(default=4e-6, ge=0, le=1)
    """Learning rate of the last step, as a share of the peak."""
    momentum: list[Annotated[float, Field(ge=0, lt=1)]] | None = Field(default=[0.85, 0.95], min_length=2, max_length=2)
    """[lowest, highest] momentum, or first beta of AdamW: it falls while the learning rate rises, and rises again
    afterwards. null leaves it alone."""

    @model_validator(mode="after")
    def _ordered(self) -> OneCycleSection:
        if self.momentum is not None and self.momentum[0] > self.momentum[1]:
            raise ValueError(f"momentum: found {self.momentum}, allowed: [lowest, highest]")
        return self


class PlateauSection(Section):
    """``training.plateau``: the schedule plateau, which lowers the learning rate where a metric improves no longer."""

    metric: str = "validation_loss"
    """As early_stopping.metric."""
    factor: float = Field(default=0.5, gt=0, lt=1)
    """By which the learning rate is multiplied; it does not fall below final_learning_rate_fraction of the peak."""
    patience: Count = 2
    """Evaluations in a row without improvement after which it is."""
    minimum_change: float = Field(default=0.0, ge=0, le=1e30)
    """Smallest change that counts as an improvement."""

    _named = field_validator("metric")(_known_form)


class EmaSection(Section):
    """``training.ema``: an exponential moving average of the weights."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Share of the average that stays in each step."""
    warmup: bool = True
    """Let the average follow faster in the beginning: the share is at most (1 + steps) / (10 + steps)."""


class AnomaliesSection(Section):
    """``training.anomalies``: what to do about a gradient that is not finite, or a loss that jumps."""

    policy: Literal["stop", "skip", "roll_back"] = "stop"
    """stop ends the run. skip goes on from the last checkpoint without the batch; roll_back leaves out all batches
    since that checkpoint too (Chowdhery et al. 2022, section 5.1)."""
    spike_factor: float | None = Field(default=None, gt=1, le=1e30)
    """A loss above this many times the median of the last ``window`` steps is an anomaly; by default only a gradient
    that is not finite is."""
    window: int = Field(default=50, ge=2, le=10**6)
    """Steps over which the median is taken; before a run has made so many, no loss counts as a spike."""
    limit: Count = 10
    """Number of anomalies after which the run ends, whatever the policy."""


class TrainingSection(Section):
    """``training``: length, batch, optimizer, schedule, precision, logging."""

    steps: Annotated[Count | None, MayChange()] = None
    """Optimizer steps. Give one of steps, tokens and epochs."""
    tokens: Annotated[Total | None, MayChange()] = None
    """Tokens to train on; rounded up to whole steps."""
    epochs: Annotated[float | None, MayChange()] = Field(default=None, gt=0, le=1e6)
    """Passes over the training set; rounded up to whole steps."""
    batch_size: Count = 32
    """Sequences in a step, all workers together."""
    group_by_length: bool = False
    """Put samples of about the same length into a batch, so that less of it is padding: classification, tagging,
    extractive_qa, sequence_to_sequence and preference. The order then follows from batch_size too."""
    sequence_length: int = Field(default=256, ge=2, le=LARGEST_COUNT)
    """Tokens in a sequence."""
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """muon orthogonalises the updates of weight matrices and gives the other parameters to AdamW."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1e30)
    """Peak learning rate. With muon, that of the parameters that AdamW updates (embeddings, norms, biases)."""
    matrix_learning_rate: float = Field(default=0.02, gt=0, le=1e30)
    """Peak learning rate of weight matrices with muon."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of muon and sgd."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    """AdamW's decay rates of the first and second moment."""
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    """AdamW's epsilon, which avoids division by zero."""
    weight_decay: float = Field(default=0.1, ge=0, le=1e6)
    """Decoupled weight decay of matrices. Norms and biases have no decay."""
    schedule: Literal["cosine", "linear", "polynomial", "constant", "wsd", "one_cycle", "plateau"] = "cosine"
    """Shape of the learning rate after warm-up; wsd is warm-up, stable, decay; one_cycle rises and falls by itself;
    plateau falls where a metric no longer improves."""
    warmup_steps: CountFromZero = 0
    """Steps of linear warm-up."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of the steps, at the end, in which the learning rate falls linearly."""
    power: float = Field(default=2.0, gt=0, le=100)
    """polynomial: power of what is left of the steps."""
    one_cycle: OneCycleSection = OneCycleSection()
    """one_cycle: its phases."""
    plateau: PlateauSection = PlateauSection()
    """plateau: when the learning rate falls, and by how much."""
    final_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak; of plateau the lowest. one_cycle has its own."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout in the model while it trains; by default what the model's configuration says, which
    the exported model keeps."""
    gradient_clipping: float = Field(default=1.0, ge=0, le=1e30)
    """Largest norm of the whole gradient; 0 does not clip."""
    precision: Annotated[Literal["auto", "fp32", "bf16"], MayChange(to=("auto",))] = "auto"
    """bf16 keeps fp32 master weights (parallel.zero_stage 1 to 3). auto: bf16 on a GPU; on CPUs what is measured to be
    faster when the run first starts, and fp32 where parallel.zero_stage is 0. A run stays with what it began with."""
    compile: Annotated[bool, MayChange()] = False
    """Run the model through torch.compile: the first step takes a minute or so longer, the others less; needs a C++
    compiler on every node."""
    keep_zeros: bool = False
    """Weights of matrices that are zero in the model at model.path stay zero."""
    log_every_steps: Annotated[Count, MayChange()] = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every_steps: Annotated[Count | None, MayChange()] = None
    """Steps between two evaluations. By default only the end of training is evaluated."""
    evaluation_batches: Annotated[Count | None, MayChange()] = None
    """Batches of an evaluation; by default the whole validation set."""
    early_stopping: Annotated[EarlyStoppingSection | None, MayChange()] = None
    """Stop when a metric no longer improves; off by default."""
    restore_best: Annotated[bool | Literal["auto"], MayChange()] = "auto"
    """Export the weights of the best evaluation, not the last ones; auto does so with early_stopping."""
    ema: EmaSection | None = None
    """Keep a moving average of the weights, and evaluate and export that; off by default."""
    anomalies: Annotated[AnomaliesSection, MayChange()] = AnomaliesSection()
    """What to do about a gradient that is not finite, or a loss that jumps."""
    log_samples: Annotated[bool, MayChange()] = False
    """Write the sample numbers of every step to samples/, one file for each worker."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens and epochs; found: {', '.join(given) or 'none'}")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: found {self.warmup_steps}, allowed: fewer than steps ({self.steps})")
        if self.schedule == "one_cycle" and self.warmup_steps:
            raise ValueError(
                f"warmup_steps: found {self.warmup_steps}, allowed with schedule one_cycle: 0; it has its own"
            )
        needing = {
            "early_stopping": self.early_stopping is not None,
            "restore_best": self.restore_best is True,
            "schedule plateau": self.schedule == "plateau",
        }
        if not self.evaluate_every_steps and (name := next((name for name, needs in needing.items() if needs), None)):
            raise ValueError(f"evaluate_every_steps: missing; {name} needs it")
        return self

    @property
    def restores_best(self) -> bool:
        """Whether the weights of the best evaluation are exported."""
        return self.early_stopping is not None if self.restore_best == "auto" else self.restore_best


class ParallelSection(Section):
    """``parallel``: how the model and the batch are cut over the workers."""

    data: CountOrAuto = "auto"
    """Replicas that share a batch; auto is the number of workers."""
    tensor: CountOrAuto = 1
    """Processes that share each layer; workers = data x tensor x pipeline. auto, here and below,
    takes the layout that fits a worker's memory and has the shortest estimated step; ``raylm plan`` shows it."""
    pipeline: CountOrAuto = 1
    """Pipeline stages, each with a part of the blocks (schedule 1F1B: one forward, one backward)."""
    zero_stage: Literal[0, 1, 2, 3, "auto"] = 1
    """DeepSpeed ZeRO: 0 replicates everything, 1 shards optimizer state, 2 gradients too, 3 parameters too. 2 and 3
    work with data parallelism only."""
    micro_batch_size: CountOrAuto = "auto"
    """Sequences that a worker processes at once; gradients are accumulated over the rest of its batch."""
    balance: Literal["parameters", "time"] = "parameters"
    """What pipeline stages have in equal parts: parameters, or time. Time is measured for each layer when the run first
    starts, and kept in stages.json."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass to save memory; auto does so if they do not fit."""

    @property
    def model_parallel(self) -> int:
        """Processes that hold one copy of the model between them, as far as the file says."""
        return (1 if self.tensor == "auto" else self.tensor) * (1 if self.pipeline == "auto" else self.pipeline)


class CheckpointSection(Section):
    """``checkpoint``: when to save, and how many to keep."""

    every_steps: Count | None = None
    """Steps between two checkpoints; off by default."""
    every_seconds: Seconds | None = 60.0
    """Seconds between two checkpoints; the end of training always saves one."""
    keep: Count = 2
    """Newest checkpoints to keep. With evaluate_every_steps the best one is kept too, by training.early_stopping.metric
    or else the validation loss."""
    asynchronous: bool = True
    """Write in the background. Training waits only if a write takes longer than a forward and backward pass."""
