"""A Hugging Face configuration and a freshly initialised model by the name of a family.

``model.config`` in the YAML holds the Hugging Face configuration's own keys. What raylm adds: the vocabulary size and
special tokens come from the tokenizer, the number of positions defaults to the training context, and dropout is off
by default, as is usual in pretraining.
"""

from __future__ import annotations

import copy
import difflib
import re
from typing import TYPE_CHECKING, Any

from raylm.config.base import LARGEST_COUNT
from raylm.errors import UserError
from raylm.models.families import all_families, find_family
from raylm.models.heads import CAUSAL, Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from raylm.models.families.base import Family

# Far above the largest models that there are.
MOST_LAYERS = 2_000
MOST_WIDTH = 10**6


def build_config(
    family: str, values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> PretrainedConfig:
    """The Hugging Face configuration of a new model.

    Args:
        family: a key of :data:`raylm.config.families.FAMILIES`.
        values: the user's ``model.config``.
        tokenizer: source of the vocabulary size and the special tokens.
        sequence_length: tokens a training sequence; the default for the number of positions.

    Raises:
        UserError: a key that the configuration does not have, or values that do not go together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    known = find_family(family)
    assert known is not None, family
    reference = AutoConfig.for_model(known.model_type)
    # attribute_map holds the generic names (hidden_size for n_embd), which the configuration takes as well.
    names = set(known.own.keys) if known.own else set(reference.to_dict()) | set(reference.attribute_map)
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key, sorted(names), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UserError(f"model.config.{key}: no such key in the {family} configuration{hint}")
        _check_value(key, values[key], getattr(reference, key, None), known.positions_key)
    positions = {known.positions_key: sequence_length} if known.positions_key else {}
    settings = {**positions, **known.defaults, **values}
    settings |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if reference.is_encoder_decoder:
        settings["decoder_start_token_id"] = tokenizer.pad_token_id
    try:
        config = AutoConfig.for_model(known.model_type, **settings)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model.config: {_reason(error)}") from None
    if known.own is not None:
        known.own.check(config)
    _check_shape(known, config)
    return config


def why_invalid(config: PretrainedConfig) -> str | None:
    """Why transformers would refuse to load a configuration that was changed; None where it would not."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict(config.to_dict())
    except (TypeError, ValueError, StrictDataclassError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """The last line; the ones before say which validator found it."""
    return str(error).strip().splitlines()[-1].strip()


def _check_shape(known: Family, config: PretrainedConfig) -> None:
    """Refuse a width that attention heads do not divide."""
    for name in filter(None, (known.width_key, known.heads_key)):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"model.config.{name}: found {value!r}, allowed: an integer above 0")
    if known.width_key is None or known.heads_key is None:
        return
    width, heads = getattr(config, known.width_key), getattr(config, known.heads_key)
    if width % heads and not (known.head_width_key and getattr(config, known.head_width_key, None)):
        raise UserError(
            f"model.config.{known.heads_key}: found {heads}, allowed: a divisor of {known.width_key} ({width})"
        )
    key_value_heads = getattr(config, "num_key_value_heads", None)
    if key_value_heads and heads % key_value_heads:
        raise UserError(
            f"model.config.num_key_value_heads: found {key_value_heads}, "
            f"allowed: a divisor of {known.heads_key} ({heads})"
        )


def _check_value(key: str, value: Any, default: Any, positions_key: str | None) -> None:
    """Refuse what no layer can be built from, or not in a lifetime: the configuration itself takes any number.

    Args:
        default: what the configuration has without the key.
    """
    from transformers.activations import ACT2FN

    # T5 writes a gated network so.
    known = isinstance(value, str) and value.removeprefix("gated-" if key == "feed_forward_proj" else "") in ACT2FN
    if isinstance(default, str) and default in ACT2FN and not known:
        raise UserError(f"model.config.{key}: found {str(value)[:100]!r}, allowed: {', '.join(sorted(ACT2FN))}")
    # None is what follows from other sizes, as num_key_value_heads.
    derived = default is None and re.search("size|num_|head_dim|inner", key) is not None
    counts = isinstance(default, int) and not isinstance(default, bool) and default > 0
    if not (derived or counts) or key.endswith("_id") or (derived and value is None):
        return
    is_context = key in (positions_key, "max_position_embeddings")
    most = LARGEST_COUNT if is_context else MOST_LAYERS if "layer" in key else MOST_WIDTH
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UserError(f"model.config.{key}: found {str(value)[:100]}, allowed: an integer from 1 to {most}")


def check_positions(config: PretrainedConfig, sequence_length: int, key: str = "training.sequence_length") -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        UserError: names ``key``, the length and the number of positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise UserError(f"{key}: found {sequence_length}, allowed: at most the model's {positions} positions")


def check_head(config: PretrainedConfig, head: Head, path: str, key: str = "model.path") -> None:
    """Refuse a model of a known family that takes no such ``head``: transformers would put a random one on it.

    Raises:
        UserError: names ``key``, ``path`` and the model's type.
    """
    family = find_family(config.model_type)
    if family is not None and head.network != family.network:
        allowed = sorted(known.model_type for known in all_families() if known.network == head.network)
        raise UserError(
            f"{key}: found {path}, a {config.model_type} model, allowed: a {head.what}, whose family is "
            f"{' or '.join(allowed)} or another {head.network.replace('_', '-')}"
        )


def build_model(config: PretrainedConfig, seed: int, head: Head = CAUSAL) -> PreTrainedModel:
    """A new model in fp32 with weights drawn from ``seed``; the same on every process."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return head.load_class().from_config(config, dtype=torch.float32)


def build_empty(config: PretrainedConfig, head: Head = CAUSAL) -> PreTrainedModel:
    """A model of this configuration without memory for its weights (torch's meta device)."""
    import torch

    with torch.device("meta"):
        return head.load_class().from_config(config)


def has_dropout(config: PretrainedConfig) -> bool:
    """Whether any of the configuration's dropout probabilities is above 0; those of heads for classification aside."""
    return any(
        isinstance(value, float) and value > 0
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("_pdrop")) and not key.startswith(("summary", "classifier"))
    )


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """Every dropout probability of a configuration, by key; what is None follows from another."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("_pdrop")) and type(value) in (int, float)
    }


def check_dropout(config: PretrainedConfig, probability: float | None) -> None:
    """Refuse a dropout for a model that has no place for it.

    Raises:
        UserError: one line.
    """
    if probability is not None and not dropout_of(config):
        raise UserError(
            f"training.dropout: found {probability:g}, allowed for a {config.model_type} model: leave it out, as its "
            "configuration has no dropout"
        )


def with_dropout(config: PretrainedConfig, values: dict[str, float] | float | None) -> PretrainedConfig:
    """A copy of ``config`` with these dropout probabilities, or one for all; ``config`` itself for None."""
    if values is None:
        return config
    changed = copy.deepcopy(config)
    for key in dropout_of(config):
        setattr(changed, key, values[key] if isinstance(values, dict) else values)
    return changed


def parameter_count(config: PretrainedConfig, head: Head = CAUSAL) -> int:
    """Parameters of a model of this configuration, tied weights once; allocates none of them."""
    return sum(parameter.numel() for parameter in build_empty(config, head).parameters())


def fused_parts(name: str, model_type: str) -> int:
    """How many matrices lie side by side in the last dimension of the weight ``name``; 1 for most."""
    family = find_family(model_type)
    fused = family.fused_matrices if family else {}
    return next((parts for suffix, parts in fused.items() if name.endswith(suffix)), 1)
