"""What a run whose base weights are in 4 bits is compared with at its end.

The adapter was trained beside weights that were rounded; on disk it is merged into the original ones. So two things are
compared, each with its like: the adapter's file, put back beside the rounded weights, with the trained model, and the
merged model with the original weights beside which the same file is put.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raylm.models.adapters import add_adapter
from raylm.models.lora import RUN_FOLDER
from raylm.models.weights import make_outline
from raylm.parallel.engines.filling import fill
from raylm.tasks.objective import Batch
from raylm.training.checkpoints.adapters import read_adapter

if TYPE_CHECKING:
    from raylm.training.loop.training_loop import TrainingLoop


def put_back_logits(loop: TrainingLoop, probe: Batch) -> torch.Tensor:
    """Logits of the live model once its adapter is what the run's directory holds; no ZeRO stage that is allowed with
    4 bits makes that a collective."""
    read_adapter(loop.job.directory / RUN_FOLDER, loop.engine.parameters)
    return loop.engine.logits(probe).cpu()


@torch.no_grad()
def beside_original_logits(loop: TrainingLoop, probe: Batch) -> torch.Tensor:
    """fp32 logits of the original weights with the run's adapter beside them, on the CPU as ``probe``."""
    section, head = loop.config.adapter, loop.objective.head
    assert section is not None and loop.original is not None
    model = make_outline(loop.model_config, head).model
    names = {parameter: name for name, parameter in model.named_parameters()}
    fill(model, names, loop.original, torch.device("cpu"))
    add_adapter(model, section, head, loop.config.run.seed)
    read_adapter(loop.job.directory / RUN_FOLDER, dict(model.named_parameters()))
    return loop.objective.logits(model.eval(), probe).float()
