"""From what a user calls a model to its configuration, and to the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raylm.data.loading import resolve_model
from raylm.errors import UserError, first_line
from raylm.models.heads import CAUSAL, Head

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    key: str = "model.path",
    head: Head = CAUSAL,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a model for inference or further training; never runs code from the directory.

    Args:
        path: what :func:`resolve_model` takes.
        dtype: type of the weights; fp32 by default.
        head: the head that it must have (:mod:`raylm.models.heads`).
        config: instead of the directory's own, where a new head is to have other labels.

    Raises:
        UserError: the directory is damaged, the hub has no such model, or it has another head.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    from raylm.models.families.build import check_head

    # A bar for each load says nothing on a stage's own output.
    logging.disable_progress_bar()
    check_head(load_config(path, key), head, str(path), key)
    source = resolve_model(path, key)
    try:
        return head.load_class().from_pretrained(
            source, config=config, dtype=dtype or torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key}: {path} cannot be loaded: {first_line(error)}") from None


def load_config(path: str | Path, key: str = "model.path") -> PretrainedConfig:
    """The configuration of a model directory, run directory or hub name.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(path, key), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be loaded: {first_line(error)}") from None
