"""What a user names a model by, and the tokenizer that lies there: a run directory, a Hugging Face directory, or a hub
name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from raylm.config.base import path_refusal
from raylm.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longest wait for the hub's answer whether it has a model.
HUB_SECONDS = 10.0


def resolve_model(path: str | Path, key: str = "model.path") -> str:
    """The Hugging Face directory (or hub name) that ``path`` means.

    A run directory stands for its ``model/``. Something that exists nowhere on disk and looks like ``owner/name`` or
    ``name`` is taken for a hub name, unless there is a directory ``owner``.

    Raises:
        UserError: an existing directory without a model, a path that does not exist, or a hub name that neither the
            cache nor the hub knows; names ``key``.
    """
    text = str(path)
    if refusal := path_refusal(text):
        raise UserError(f"{key}: found {text[:100]!r}, {refusal}")
    directory = Path(text).expanduser()
    for candidate in (directory / "model", directory):
        if (candidate / "config.json").is_file():
            return str(candidate.resolve())
    if directory.exists():
        raise UserError(f"{key}: {path} holds no model (no config.json, no model/config.json)")
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")
    if is_path or ("/" in text and directory.parent.is_dir()):
        raise UserError(f"{key}: {path} does not exist{_near(directory)}")
    _check_hub(text, key)
    return text


def _near(directory: Path) -> str:
    """A question about a name beside ``directory`` that looks like it; empty where there is none."""
    if not directory.parent.is_dir():
        return ""
    names = [other.name for other in directory.parent.iterdir() if other.is_dir()]
    close = difflib.get_close_matches(directory.name, names, n=1)
    return f"; did you mean {directory.parent / close[0]}?" if close else ""


def _check_hub(name: str, key: str) -> None:
    """Refuse what is neither in the hub's cache nor on the hub, with one request: loading would ask again and again.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
        if cached.is_dir():
            return
        reason = "offline mode is on (HF_HUB_OFFLINE)"
        if not is_offline_mode():
            HfApi().model_info(name, timeout=HUB_SECONDS)
            return
    except HFValidationError:
        raise UserError(f"{key}: {name} does not exist{_near(Path(name))}") from None
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or only for those who log in"
    except httpx.HTTPError as error:
        reason = f"the hub did not answer: {first_line(error)}"
    raise UserError(f"{key}: {name} is no directory{_near(Path(name))}, and as a hub name not in the cache: {reason}")


def same_tokens(one: str | Path, other: str | Path) -> bool:
    """Whether the tokens of two models, or tokenizer directories, have the same numbers.

    Raises:
        UserError: one of them has no tokenizer.
    """
    return Path(one) == Path(other) or load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()


def load_tokenizer(path: str | Path, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or tokenizer directory.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    if refusal := path_refusal(str(path)):
        raise UserError(f"{key}: found {str(path)[:100]!r}, {refusal}")
    directory = Path(path).expanduser()
    source = str(directory) if (directory / "tokenizer_config.json").is_file() else resolve_model(path, key)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - what a damaged file leads to has any class, KeyError and bare ones too
        raise UserError(f"{key}: {path} has no usable tokenizer: {first_line(error)}") from None
