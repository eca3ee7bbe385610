"""Whether the parts of a model fit together: weights, configuration, tokenizer. Reads no weights.

Every stage that takes a model asks before it starts: a worker or a replica would die of what these find, without the
cause.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Tokens that stages put into texts themselves.
_NAMED = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")
# Weights that only a pickle, or another framework, reads.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf")


def check_weights(directory: str | Path, key: str = "model.path") -> None:
    """Refuse a model directory whose safetensors files are missing or damaged; of a hub name nothing is known yet.

    Raises:
        UserError: names ``key`` and the file.
    """
    from safetensors import SafetensorError, safe_open

    directory = Path(directory)
    if not directory.is_dir():
        return
    for name, tensors in _shards(directory, key).items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{key}: {path} is missing{_instead(directory)}")
        try:
            with safe_open(path, framework="np") as shard:
                missing = sorted(tensors - set(shard.keys()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key}: {path} is damaged: {first_line(error)}") from None
        if missing:
            raise UserError(f"{key}: {path} is damaged: without {missing[0]}, which {INDEX} names")


def _shards(directory: Path, key: str) -> dict[str, set[str]]:
    """Name of a file -> the tensors that the index says it holds."""
    index = directory / INDEX
    if not index.exists() or (directory / WEIGHTS).is_file():
        return {WEIGHTS: set()}
    places = read_part(index, key).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and name for name in places.values()):
        raise UserError(f"{key}: {index} is damaged: found no weight_map of tensors and files")
    shards: dict[str, set[str]] = {}
    for tensor, name in places.items():
        if Path(name).name != name:
            raise UserError(f"{key}: {index} is damaged: found the file {name!r}, allowed: one beside it")
        shards.setdefault(name, set()).add(tensor)
    return shards or {WEIGHTS: set()}


def _instead(directory: Path) -> str:
    """What to do about weights of another format."""
    found = next((path.name for pattern in _OTHER_WEIGHTS for path in sorted(directory.glob(pattern))), None)
    if found is None:
        return ""
    return (
        f"; found {found}, allowed: safetensors, as loading a pickle may run code. If you trust it, load it with "
        "transformers and write it anew with save_pretrained"
    )


def read_part(path: Path, key: str) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file.

    Raises:
        UserError: the file is damaged; names ``key`` and the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path} is damaged: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} is damaged: found no JSON object")
    return found


def check_vocabulary(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str | Path, key: str = "model.path"
) -> None:
    """Refuse token ids that the embedding has no row for: the tokenizer's, and the special ones of the configuration.

    An embedding with more rows than the tokenizer has tokens (padded for speed) is fine. So are special tokens beyond
    it that no text becomes, as Gemma 3's text models have one for images.

    Args:
        source: the model; of a directory ``generation_config.json`` is read too.

    Raises:
        UserError: names ``key``, the ids and the number of rows.
    """
    rows = getattr(config, "vocab_size", None)
    if not isinstance(rows, int):
        return
    unused = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused -= {getattr(tokenizer, f"{name}_token_id") for name in _NAMED}
    largest = max(set(tokenizer.get_vocab().values()) - unused, default=-1)
    if largest >= rows:
        raise UserError(
            f"{key}: {source}: found a tokenizer with token ids up to {largest}, allowed: at most {rows - 1}, as the "
            f"model's embedding has {rows} rows (vocab_size); give it the tokenizer that it was trained with"
        )
    generation = read_part(Path(source) / "generation_config.json", key)
    for name, values in (("config.json", config.to_dict()), ("generation_config.json", generation)):
        for field, value in values.items():
            # -1 is how older configurations say none.
            ids = value if isinstance(value, list) else [value]
            bad = next((found for found in ids if isinstance(found, int) and not -1 <= found < rows), None)
            if field.endswith("_token_id") and bad is not None:
                raise UserError(
                    f"{key}: {source}: {name}: found {field} {bad}, allowed: 0 to {rows - 1}, as the model's embedding "
                    f"has {rows} rows (vocab_size)"
                )
