"""What a user names a model by, and the tokenizer that lies there: a run directory, a Hugging Face directory, or a hub
name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raylm.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
