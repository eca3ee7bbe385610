"""Directories that peft wrote for LoRA (arXiv:2106.09685): read without peft, checked against a model's layers.

In: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or the run that has one. Out: the two
matrices and the scale of each layer. What changes a model in any other way than W + s B A is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm.config.base import path_refusal
from raylm.data.loading import load_tokenizer
from raylm.errors import UserError, first_line
from raylm.models.checks import check_vocabulary, read_part
from raylm.models.stops import stop_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SETTINGS, WEIGHTS, RUN_FOLDER = "adapter_config.json", "adapter_model.safetensors", "adapter"
PREFIX, FIRST, SECOND = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Settings under which a layer gives something else than W + s B A, at inference too.
_OTHER = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "modules_to_save", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters", "layer_replication", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Ways to begin that change the model's own weights, unless peft was told to convert them.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraLayer:
    """What is added to one linear layer: ``scale * second @ first``.

    Attributes:
        first: A, [rank, inputs].
        second: B, [outputs, rank].
        scale: alpha / rank, or alpha / sqrt(rank) if rank-stabilised (arXiv:2312.03732).
    """

    first: torch.Tensor
    second: torch.Tensor
    scale: float


def resolve_adapter(path: str | Path, key: str) -> Path:
    """The adapter's directory that ``path`` means: itself, or a run's ``adapter/``.

    Raises:
        UserError: there is none.
    """
    if refusal := path_refusal(str(path)):
        raise UserError(f"{key}: found {str(path)[:100]!r}, {refusal}")
    directory = Path(path).expanduser()
    for candidate in (directory / RUN_FOLDER, directory):
        if (candidate / SETTINGS).is_file():
            return candidate.resolve()
    if directory.exists():
        raise UserError(f"{key}: {path} holds no adapter (no {SETTINGS}, no {RUN_FOLDER}/{SETTINGS})")
    raise UserError(f"{key}: {path} does not exist; allowed: an adapter's directory, or a run with one")


def load_lora(path: str | Path, key: str) -> dict[str, LoraLayer]:
    """The layers of an adapter by their names in the model, on the CPU.

    Raises:
        UserError: it is missing, damaged, or no LoRA of linear layers; one line.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = resolve_adapter(path, key)
    settings = read_part(directory / SETTINGS, key)
    _check_settings(settings, directory, key)
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"{key}: {directory} has no {WEIGHTS}; allowed: adapters in safetensors")
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {directory / WEIGHTS} is damaged: {first_line(error)}") from None
    names = {name.removeprefix(PREFIX).removesuffix(end) for name in tensors for end in (FIRST, SECOND)
             if name.endswith(end)}  # fmt: skip
    expected = {f"{PREFIX}{name}{end}" for name in names for end in (FIRST, SECOND)}
    if not names or (odd := sorted(expected ^ set(tensors))):
        found = "no matrices" if not names else f"{'' if odd[0] in tensors else 'no '}{odd[0]}"
        raise UserError(f"{key}: {directory / WEIGHTS}: found {found}, allowed: lora_A and lora_B of linear layers")
    layers = {}
    for name in sorted(names):
        first, second = tensors[f"{PREFIX}{name}{FIRST}"], tensors[f"{PREFIX}{name}{SECOND}"]
        if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
            raise UserError(
                f"{key}: {directory / WEIGHTS}: found {name} with matrices {tuple(first.shape)} and "
                f"{tuple(second.shape)}, allowed: [rank, inputs] and [outputs, rank]"
            )
        layers[name] = LoraLayer(first.float(), second.float(), _scale(settings, name, first.shape[0]))
    return layers


def _check_settings(settings: dict[str, Any], directory: Path, key: str) -> None:
    where = f"{key}: {directory / SETTINGS}"
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{where}: found peft_type {kind}, allowed: LORA")
    for name in _OTHER:
        if value := settings.get(name):
            hint = "; serve the run's merged model/ instead" if name == "use_dora" else ""
            raise UserError(f"{where}: found {name} {str(value)[:80]}, allowed: LoRA of linear layers alone{hint}")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{where}: found bias {settings['bias']}, allowed: none")
    begun = settings.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.startswith(_CHANGED_BASE):
        raise UserError(
            f"{where}: found init_lora_weights {begun}, which changes the model's own weights, allowed: an adapter "
            "that peft has converted to LoRA"
        )
    if not isinstance(settings.get("lora_alpha", 8), int | float):
        raise UserError(f"{where}: found lora_alpha {settings['lora_alpha']!r}, allowed: a number")


def _scale(settings: dict[str, Any], name: str, rank: int) -> float:
    """How often the product of a layer's matrices counts; patterns are matched as peft does (``get_pattern_key``)."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def adapter_tokenizer(path: str | Path, key: str, own: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer beside an adapter, for its chat template and end tokens; the model's ``own`` where there is none.

    Raises:
        UserError: it gives the model's tokens other numbers.
    """
    directory = resolve_adapter(path, key)
    if not (directory / "tokenizer_config.json").is_file():
        return own
    tokenizer = load_tokenizer(directory, key)
    numbers = tokenizer.get_vocab()
    odd = next((token for token, number in own.get_vocab().items() if numbers.get(token) != number), None)
    if odd is not None:
        raise UserError(
            f"{key}: {directory} has a tokenizer with the number {numbers.get(odd)} for {odd!r}, allowed: "
            f"{own.get_vocab()[odd]}, as the model's has"
        )
    return tokenizer


def adapter_ends(path: str | Path, key: str) -> frozenset[int]:
    """Tokens that end an adapter's texts beside the model's own: those of the tokenizer that lies there."""
    directory = resolve_adapter(path, key)
    if not (directory / "tokenizer_config.json").is_file():
        return frozenset()
    return frozenset(stop_tokens(load_tokenizer(directory, key), None))


def check_lora(layers: dict[str, LoraLayer], model: PreTrainedModel, path: str, key: str) -> None:
    """Refuse an adapter of another model.

    Args:
        model: with its layers; may be without memory.

    Raises:
        UserError: names the layer.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    for name, layer in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | Conv1D):
            what = "which the model does not have" if module is None else f"a {type(module).__name__}"
            raise UserError(f"{key}: {path}: found the layer {name}, {what}; allowed: linear layers of model.path")
        shape = tuple(module.weight.shape)
        outputs, inputs = shape[::-1] if isinstance(module, Conv1D) else shape
        if (layer.second.shape[0], layer.first.shape[1]) != (outputs, inputs):
            raise UserError(
                f"{key}: {path}: found {name} of {layer.first.shape[1]} inputs and {layer.second.shape[0]} outputs, "
                f"allowed: {inputs} and {outputs}, as the model has; was the adapter made for another one?"
            )


def check_adapters(
    adapters: dict[str, str], config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> None:
    """Refuse adapters that cannot be served with a causal model of this configuration; reads no weights of it.

    Args:
        adapters: paths by names.
        tokenizer: of the model.
        key: of the adapters in the configuration file.

    Raises:
        UserError: one line about the first mistake.
    """
    from raylm.models.weights import make_outline

    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{key}: allowed with a model whose weights are not quantized (quantization_config)")
    model = make_outline(config).model
    for name, path in adapters.items():
        check_lora(load_lora(path, f"{key}.{name}"), model, path, f"{key}.{name}")
        own = adapter_tokenizer(path, f"{key}.{name}", tokenizer)
        if own is not tokenizer:
            check_vocabulary(config, own, resolve_adapter(path, key), f"{key}.{name}")
