"""From what a user calls a model to its configuration, and to the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raylm.config.families import FAMILIES
from raylm.data.loading import load_tokenizer, resolve_model
from raylm.errors import UserError, first_line
from raylm.models.checks import check_vocabulary, check_weights, read_part
from raylm.models.families import find_family
from raylm.models.heads import CAUSAL, Head

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    check_weights(source, key)
    try:
        return head.load_class().from_pretrained(
            source, config=config, dtype=dtype or torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, SafetensorError) as error:
        # As tensors of another shape, or values that no layer can be built from.
        raise UserError(f"{key}: {path} cannot be loaded: {first_line(error)}") from None


def load_config(path: str | Path, key: str = "model.path") -> PretrainedConfig:
    """The configuration of a model directory, run directory or hub name.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import AutoConfig

    source = resolve_model(path, key)
    model_type = read_part(Path(source) / "config.json", key).get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES and FAMILIES[model_type].own:
        # Makes it known to transformers.
        find_family(model_type)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - what a damaged file leads to has any class
        raise UserError(f"{key}: {path} cannot be loaded: {first_line(error)}") from None


def load_parts(
    path: str | Path, key: str = "model.path", *, weights: bool = True
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of a model whose parts fit together; reads no weights.

    Args:
        path: what :func:`resolve_model` takes.
        weights: whether to look at the weights too, which an export for another engine does without.

    Raises:
        UserError: a part is missing or damaged, or the parts do not fit.
    """
    source = resolve_model(path, key)
    config, tokenizer = load_config(source, key), load_tokenizer(source, key)
    if weights:
        check_weights(source, key)
    check_vocabulary(config, tokenizer, source, key)
    return config, tokenizer
