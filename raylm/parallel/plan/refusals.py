"""What a model does not allow of ``parallel``: found from its configuration, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylm.config.training import ParallelSection
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from raylm.tasks.objective import Objective


def check_splits(config: PretrainedConfig, parallel: ParallelSection, objective: Objective) -> None:
    """Refuse a model that cannot be cut as ``parallel`` says; ``auto`` takes only what can be.

    Args:
        objective: what it is trained on.

    Raises:
        UserError: names the key, what was found and what is allowed.
    """
    tensor, pipeline = (1 if n == "auto" else n for n in (parallel.tensor, parallel.pipeline))
    if refusal := model_refusal(config, objective, tensor, pipeline):
        raise UserError(refusal)


def model_refusal(config: PretrainedConfig, objective: Objective, tensor: int, pipeline: int) -> str:
    """Why the model cannot be cut so, as one line; empty where it can be."""
    if tensor * pipeline == 1:
        return ""
    from raylm.models.families import all_families, find_outline

    found = f"parallel.tensor: found {tensor}" if tensor > 1 else f"parallel.pipeline: found {pipeline}"
    plan = find_outline(config.model_type)
    if plan is None:
        return (
            f"{found}, allowed for {config.model_type}: 1; tensor and pipeline parallelism are for "
            f"{', '.join(sorted(family.model_type for family in all_families() if family.outline))}"
        )
    if not objective.predicts_tokens:
        return f"{found}, allowed with objective.type {objective.name}: 1"
    for name in plan.shared_out:
        value = plan.shared_out[name](config)
        if value % tensor:
            return f"parallel.tensor: found {tensor}, allowed: a divisor of the model's {name} ({value})"
    blocks = plan.block_count(config)
    if pipeline > blocks:
        return f"parallel.pipeline: found {pipeline}, allowed: at most the model's {blocks} blocks"
    return ""
