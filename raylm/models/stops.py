"""Which tokens end an answer: those that the model's directory names, and what its chat template ends a turn with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for what is said.
_SAID = "said"


def end_token_ids(source: str) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, else of config.json; may be empty."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(source, name).get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def read_json(source: str, name: str) -> dict[str, Any]:
    """A file of a model's directory, or of the hub's cache; empty where there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    from transformers.utils import cached_file

    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a chat template writes behind an answer; None where it writes none, or there is no template."""
    template = tokenizer.chat_template
    if not template or (isinstance(template, dict) and "default" not in template):
        return None
    conversation = [{"role": "user", "content": _SAID}, {"role": "assistant", "content": _SAID}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError):
        # Some refuse conversations without what they ask for.
        return None
    behind = text.rpartition(_SAID)[2].lstrip()
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    found = [token for token in tokens if token and behind.startswith(token)]
    return tokens[max(found, key=len)] if found else None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, source: str | None) -> list[int]:
    """Ids that end an answer of a model that is trained on: the tokenizer's end of text first, then the others.

    Args:
        source: directory of the model that training begins with; None for a new one.
    """
    known = sorted(end_token_ids(source)) if source is not None else []
    found = [tokenizer.eos_token_id, *known, turn_end(tokenizer)]
    return list(dict.fromkeys(number for number in found if number is not None))
