"""The engine of one rank: which of the two the layout takes, and how it is set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.parallel.engines.base import Engine, EngineSettings
from raylm.parallel.engines.data_parallel import DataParallelEngine
from raylm.parallel.engines.pipeline import PipelineTensorEngine
from raylm.tasks.objective import Objective, ObjectiveModule
from raylm.training.loop.additions import additions_of
from raylm.training.loop.batches import micro_batches, to_tensors
from raylm.training.loop.measured_stages import MeasuredStages
from raylm.training.loop.worker import TrainingJob, Worker
from raylm.training.optimizers.build import make_optimizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from raylm.data.samples.token_samples import Samples
    from raylm.models.weights import Weights


def make_engine(
    job: TrainingJob,
    worker: Worker,
    objective: Objective,
    model: PreTrainedModel,
    weights: Weights,
    samples: Samples,
    device: torch.device,
) -> Engine:
    """The engine of this rank; a collective.

    Args:
        model: without memory for its parameters.
        weights: what they are to be filled with.
        samples: of the training split, on which stages are timed where the layout asks for that.
    """
    config = job.config
    training, parallel = config.training, config.parallel
    micro_batch_size = int(parallel.micro_batch_size)
    replicas = worker.world_size // parallel.model_parallel
    added = additions_of(config, model, weights, objective.head, device)
    settings = EngineSettings(
        zero_stage=parallel.zero_stage,
        micro_batch_size=micro_batch_size,
        accumulation=micro_batches(training.batch_size, replicas, micro_batch_size),
        clipping=training.gradient_clipping,
        bf16=training.precision == "bf16",
        device=device,
        weights=weights,
        compiled=training.compile,
        transform=added.transform,
        after_step=added.after_step,
        trained=added.trained,
        saves_frozen=added.saves_frozen,
    )

    def optimizer(named: dict[str, Any]) -> torch.optim.Optimizer:
        return make_optimizer(training, named, model, added.rates)

    if parallel.model_parallel == 1:
        return DataParallelEngine(ObjectiveModule(model, objective, added.reference), optimizer, settings)
    timing: dict[str, Any] = {}
    stages = MeasuredStages(job.directory, config, model.config)
    if parallel.pipeline > 1 and parallel.balance == "time":
        timing = {
            "time_batch": to_tensors(samples, np.arange(micro_batch_size), device),
            "stage_bounds": stages.known(),
        }
    engine = PipelineTensorEngine(
        model, objective, optimizer, settings, tensor=parallel.tensor, pipeline=parallel.pipeline, **timing
    )
    if timing and worker.rank == 0:
        stages.note(engine.stage_bounds)
    return engine
