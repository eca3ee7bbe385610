"""What a model does not allow of ``parallel``: found from its configuration, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylm.config.training import ParallelSection
from raylm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_cuts(config: PretrainedConfig, parallel: ParallelSection) -> None:
    """Refuse a model that cannot be cut as ``parallel`` says.

    Raises:
        UserError: names the key, what was found and what is allowed.
    """
    if parallel.cut == 1:
        return
    from raylm.parallel.families import PLANS

    if config.model_type not in PLANS:
        raise UserError(
            f"parallel.{'tensor' if parallel.tensor > 1 else 'pipeline'}: found "
            f"{max(parallel.tensor, parallel.pipeline)}, allowed for {config.model_type}: 1; cut over processes are "
            f"{', '.join(sorted(PLANS))}"
        )
    plan = PLANS[config.model_type]
    for name in plan.shared_out:
        value = plan.shared_out[name](config)
        if value % parallel.tensor:
            raise UserError(
                f"parallel.tensor: found {parallel.tensor}, allowed: a divisor of the model's {name} ({value})"
            )
    blocks = plan.block_count(config)
    if parallel.pipeline > blocks:
        raise UserError(f"parallel.pipeline: found {parallel.pipeline}, allowed: at most the model's {blocks} blocks")
