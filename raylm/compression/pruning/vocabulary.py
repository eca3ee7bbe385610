"""A smaller vocabulary: the tokens that the training text uses, for the model and for its tokenizer.

In: a model's directory, and the numbers of tokens that are used. Out: a model with as many embeddings and outputs, and
a tokenizer that cuts the training text as before. A merge of byte pair encoding stays where the token that it makes
stays, with both of its parts, so that every token that stays can be made as before; what is cut out was never made in
that text. Other text is cut into more tokens. Special tokens, single bytes and single ASCII characters always stay, so
that no text is lost that was not lost before.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.errors import RunFailure, UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from raylm.models.heads import Head

KEY, MULTIPLE = "compression.steps: prune.vocabulary", 64
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Other forms of what tokenizer.json says.
FORMS = ("vocab.json", "merges.txt", "vocab.txt", "*.model", "added_tokens.json", "special_tokens_map.json")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# WordPiece: a token within a word.
_INNER = "##"


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """``tokenizer.json`` of a model.

    Raises:
        UserError: it has none, or one of a kind that cannot be cut.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        raise UserError(f"{KEY}: found a tokenizer without {TOKENIZER}, allowed: a fast tokenizer")
    found = json.loads(path.read_text(encoding="utf-8"))
    kind = found["model"].get("type")
    if kind not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise UserError(f"{KEY}: found a {kind} tokenizer, allowed: BPE, WordPiece, WordLevel, Unigram")
    return found


def tokens_of(tokenizer: dict[str, Any]) -> dict[str, int]:
    """All tokens of a ``tokenizer.json`` by their text, the added ones too."""
    vocabulary = tokenizer["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], n) for n, row in enumerate(vocabulary))
    return dict(pairs) | {added["content"]: added["id"] for added in tokenizer["added_tokens"]}


def kept_tokens(tokenizer: dict[str, Any], used: Iterable[int], special: Iterable[int]) -> list[int]:
    """Numbers of the tokens that stay, in order.

    Args:
        tokenizer: ``tokenizer.json``.
        used: numbers that occur in the text.
        special: numbers that the model's configuration names.
    """
    numbers = tokens_of(tokenizer)
    texts = {number: text for text, number in numbers.items()}
    kept = {number for number in (*used, *special) if number in texts}
    kept |= {added["id"] for added in tokenizer["added_tokens"]}
    kept |= {number for text, number in numbers.items() if _always(text, tokenizer)}
    if (unknown := tokenizer["model"].get("unk_token")) is not None:
        kept.add(numbers[unknown])
    if tokenizer["model"]["type"] == "Unigram" and tokenizer["model"].get("unk_id") is not None:
        kept.add(tokenizer["model"]["unk_id"])
    parts = _parts(tokenizer, numbers)
    waiting = list(kept)
    while waiting:
        new = {part for pair in parts.get(waiting.pop(), ()) for part in pair} - kept
        kept |= new
        waiting += new
    return sorted(_filled(kept, parts, sorted(texts)))


def _always(text: str, tokenizer: dict[str, Any]) -> bool:
    """Whether a token stays though no text uses it."""
    if tokenizer["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(tokenizer.get("pre_tokenizer")):
        return len(text) == 1
    single = text.removeprefix(_INNER)
    return bool(_BYTE.fullmatch(text)) or text == "\u2581" or (len(single) == 1 and single.isascii())


def _parts(tokenizer: dict[str, Any], numbers: dict[str, int]) -> dict[int, list[tuple[int, int]]]:
    """Of each token the pairs that it is merged from."""
    found: dict[int, list[tuple[int, int]]] = {}
    for one, other in _merges(tokenizer["model"]):
        made = _merged(one, other, tokenizer["model"])
        if {one, other, made} <= numbers.keys():
            found.setdefault(numbers[made], []).append((numbers[one], numbers[other]))
    return found


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model.get("merges", ())]


def _merged(one: str, other: str, model: dict[str, Any]) -> str:
    return one + other.removeprefix(model.get("continuing_subword_prefix") or "")


def _filled(kept: set[int], parts: dict[int, list[tuple[int, int]]], numbers: list[int]) -> set[int]:
    """With further tokens, the first that can be made, until their number is a multiple of 64."""
    found = set(kept)
    for number in numbers:
        if len(found) % MULTIPLE == 0:
            break
        if all(part in found for pair in parts.get(number, ()) for part in pair):
            found.add(number)
    return found


def cut_tokenizer(tokenizer: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """``tokenizer.json`` with the tokens ``kept`` alone, numbered in their order."""
    new = {number: place for place, number in enumerate(kept)}
    numbers, found = tokens_of(tokenizer), copy.deepcopy(tokenizer)
    model = found["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {text: new[number] for text, number in model["vocab"].items() if number in new}
    else:
        # Unigram numbers by place; what was added lies beyond its list.
        model["vocab"] = [row for number, row in enumerate(model["vocab"]) if number in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    if "merges" in model:
        model["merges"] = [
            [one, other]
            for one, other in _merges(model)
            if all(numbers.get(text) in new for text in (one, other, _merged(one, other, model)))
        ]
    for added in found["added_tokens"]:
        added["id"] = new[added["id"]]
    _renumber(found.get("post_processor"), new)
    return found


def _renumber(processor: Any, new: dict[int, int]) -> None:
    """The numbers that stand in a post-processor, in place."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, new)
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name][1] = new[processor[name][1]]
    for one in (processor.get("special_tokens") or {}).values():
        one["ids"] = [new[number] for number in one["ids"]]


def write_tokenizer(directory: Path, tokenizer: dict[str, Any], kept: list[int]) -> None:
    """Put a cut tokenizer in the place of the one that it was made from.

    Raises:
        RunFailure: loaded again it has other tokens.
    """
    from raylm.data.loading import load_tokenizer

    for pattern in FORMS:
        for path in directory.glob(pattern):
            path.unlink()
    (directory / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    if "added_tokens_decoder" in settings:
        new = {str(number): str(place) for place, number in enumerate(kept)}
        decoder = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {new[number]: token for number, token in decoder if number in new}
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    if load_tokenizer(directory).get_vocab() != tokens_of(tokenizer):
        raise RunFailure(f"{KEY}: the tokenizer has other tokens when it is loaded again")


def special_numbers(config: PretrainedConfig) -> list[int]:
    """Tokens that a configuration names."""
    found = [getattr(config, name) for name in vars(config) if name.endswith("_token_id")]
    numbers = [number for value in found for number in (value if isinstance(value, list) else [value])]
    return [number for number in numbers if isinstance(number, int) and number >= 0]


def renumbered(config: Any, kept: list[int]) -> Any:
    """A configuration, of a model or of generation, with the numbers that its tokens have now."""
    new = {number: place for place, number in enumerate(kept)}
    found = copy.deepcopy(config)
    for name, value in vars(config).items():
        if not name.endswith("_token_id") or value is None:
            continue
        single = not isinstance(value, list)
        numbers = [new[number] for number in ([value] if single else value) if number in new]
        setattr(found, name, (numbers[0] if numbers else None) if single else numbers)
    if getattr(config, "vocab_size", None) is not None:
        found.vocab_size = len(kept)
    return found


def cut_model(model: PreTrainedModel, head: Head, kept: list[int]) -> PreTrainedModel:
    """The model with the embeddings and outputs of the tokens ``kept``."""
    import torch

    smaller = head.load_class().from_config(renumbered(model.config, kept), dtype=torch.float32).eval()
    rows, old = torch.from_numpy(np.asarray(kept)), dict(model.state_dict())
    state = {}
    for name, value in smaller.state_dict().items():
        given = old[name]
        state[name] = given if given.shape == value.shape else given[rows]
        if state[name].shape != value.shape:
            raise UserError(
                f"{KEY}: found {name} of shape {tuple(given.shape)}, allowed: weights that have a row a token"
            )
    smaller.load_state_dict(state)
    if (generation := getattr(model, "generation_config", None)) is not None:
        smaller.generation_config = renumbered(generation, kept)
    return smaller
