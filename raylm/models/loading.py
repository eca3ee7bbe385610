"""From what a user calls a model to a loaded one: a run directory, a Hugging Face directory, or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raylm.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_model(path: str | Path, key: str = "model.path") -> str:
    """The Hugging Face directory (or hub name) that ``path`` means.

    A run directory stands for its ``model/``. Something that exists nowhere on disk and looks like ``owner/name`` or
    ``name`` is taken for a hub name.

    Raises:
        UserError: an existing directory without a model, or a path that does not exist; names ``key``.
    """
    directory = Path(path).expanduser()
    for candidate in (directory / "model", directory):
        if (candidate / "config.json").is_file():
            return str(candidate.resolve())
    if directory.exists():
        raise UserError(f"{key}: {path} holds no model (no config.json, no model/config.json)")
    text = str(path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"{key}: {path} does not exist")
    return text


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    key: str = "model.path",
    head: str = "causal",
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a model for inference or further training; never runs code from the directory.

    Args:
        path: what :func:`resolve_model` takes.
        dtype: type of the weights; fp32 by default.
        head: the head that it must have (:data:`raylm.models.families.HEADS`).
        config: instead of the directory's own, where a new head is to have other labels.

    Raises:
        UserError: the directory is damaged, the hub has no such model, or it has another head.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    from raylm.models.families import auto_class, check_head

    # A bar for each load says nothing on a stage's own output.
    logging.disable_progress_bar()
    check_head(load_config(path, key), head, str(path), key)
    source = resolve_model(path, key)
    try:
        return auto_class(head).from_pretrained(
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


def load_tokenizer(path: str | Path, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or tokenizer directory.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    directory = Path(path).expanduser()
    source = str(directory) if (directory / "tokenizer_config.json").is_file() else resolve_model(path, key)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} has no usable tokenizer: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for one-line messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
