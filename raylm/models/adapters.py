"""Adapters: small matrices that are trained beside a model's own, by peft.

In: a model whose weights are there. Out: the same model, changed in place, with LoRA (arXiv:2106.09685) or DoRA
(arXiv:2402.09353) layers in it. A parameter's name there is its own with ``base_layer`` or the adapter's part in it.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from raylm.config.adapter import ALL_LINEAR, AdapterSection
from raylm.errors import UserError
from raylm.models.heads import Head

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel

# peft's own name for an adapter that has none.
NAME = "default"
FIRST, SECOND, LENGTHS = (f".{part}.{NAME}.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
BASE = ".base_layer."
# By a head's network and name, what peft calls a task.
TASK_TYPES = {
    "causal": "CAUSAL_LM",
    "sequence_to_sequence": "SEQ_2_SEQ_LM",
    "extractive_qa": "QUESTION_ANS",
    "tagging": "TOKEN_CLS",
}


def check_adapter(section: AdapterSection, config: PretrainedConfig, head: Head) -> None:
    """Refuse to start without peft, or what keeps weights in 4 bits, or with layers that the model does not have.

    Raises:
        UserError: one line.
    """
    if find_spec("peft") is None:
        raise UserError("adapter: needs peft: pip install 'raylm[adapters]'")
    if section.bits is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            "adapter.bits: found 4, which needs bitsandbytes: python -m pip install 'bitsandbytes>=0.50,<1'"
        )
    from raylm.models.weights import make_outline

    adapted_layers(make_outline(config, head).model, section, head)


def adapted_layers(model: PreTrainedModel, section: AdapterSection, head: Head) -> dict[str, Any]:
    """The layers that get adapters, by name.

    Raises:
        UserError: ``section.targets`` names one that is not there.
    """
    linear = linear_layers(model, head)
    if section.targets == ALL_LINEAR:
        return linear
    found: dict[str, Any] = {}
    for target in section.targets:
        fitting = {name: module for name, module in linear.items() if name == target or name.endswith(f".{target}")}
        if not fitting:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(f"adapter.targets: found '{target}', allowed: {ALL_LINEAR}, or of {', '.join(ends)}")
        found |= fitting
    return found


def linear_layers(model: PreTrainedModel, head: Head) -> dict[str, Any]:
    """Layers that multiply by a matrix, by name, but the output's and those of a task's own head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output, new = model.get_output_embeddings(), new_modules(model, head)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and name.partition(".")[0] not in new
    }


def new_modules(model: PreTrainedModel, head: Head) -> set[str]:
    """Modules of a task's own head, which adapters leave to be trained whole; of those that write text none."""
    if head.class_ending is None:
        return set()
    # What has nothing to train would be found by its name in the adapters themselves, as dropout.
    return {
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    }


def peft_config(section: AdapterSection, model: PreTrainedModel, head: Head, source: str | None) -> LoraConfig:
    """The adapter in peft's words.

    Args:
        model: without adapters.
        source: what the model was loaded from.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    layers = adapted_layers(model, section, head)
    return LoraConfig(
        task_type="SEQ_CLS" if head.name == "classification" else TASK_TYPES.get(head.name),
        base_model_name_or_path=source,
        inference_mode=True,
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=_ends(model, layers),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
        use_rslora=section.rank_stabilized,
        use_dora=section.type == "dora",
        modules_to_save=sorted(new_modules(model, head)) or None,
    )


def _ends(model: PreTrainedModel, layers: dict[str, Any]) -> list[str]:
    """Ends of names that mean these layers and no others; their whole names where there are none."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return ends if meant == set(layers) else sorted(layers)


def add_adapter(model: PreTrainedModel, section: AdapterSection, head: Head, seed: int) -> None:
    """Put adapters into ``model``; they are the same on every process, and change no output yet."""
    from peft import inject_adapter_in_model

    config = peft_config(section, model, head, None)
    config.inference_mode, config.modules_to_save = False, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=NAME)
    # peft leaves nothing trained but adapters.
    for name in new_modules(model, head):
        model.get_submodule(name).requires_grad_(True)
    if section.type == "dora":
        for module in model.modules():
            if len(vectors := getattr(module, "lora_magnitude_vector", ())):
                layer = vectors[NAME]
                layer.forward = functools.partial(
                    _with_lengths, layer, _squares(module.base_layer, config.fan_in_fan_out)
                )


def _squares(base_layer: Any, transposed: bool) -> torch.Tensor:
    """The squared length of each row of a weight that is not trained, [outputs]."""
    weight = base_layer.weight.detach()
    return (weight.t() if transposed else weight).float().square().sum(dim=1)


def _with_lengths(
    layer: Any,
    squares: torch.Tensor,
    inputs: torch.Tensor,
    *,
    lora_A: torch.nn.Linear,
    lora_B: torch.nn.Linear,
    scaling: float,
    base_layer: Any,
    base_result: torch.Tensor | None = None,
    adapter_name: str = NAME,
) -> torch.Tensor:
    """What peft's DoRA layer adds to ``base_result``, without the sum of both weights.

    With W the layer's weight and s B A what LoRA adds, the squared length of a row of the sum is |W|^2 + 2 s W A^T B^T
    + s^2 B A A^T B^T, of which the first is known. As in the paper, section 4.3, it has no gradient.
    """
    with torch.no_grad():
        weight = base_layer.weight.t() if layer.fan_in_fan_out else base_layer.weight
        first, second = lora_A.weight.float(), lora_B.weight.float()
        crossed = (weight.float() @ first.t()) * second
        added = (second @ (first @ first.t())) * second
        lengths = (squares + 2 * scaling * crossed.sum(dim=1) + scaling**2 * added.sum(dim=1)).clamp(min=0).sqrt()
    plain = base_layer(inputs) if base_result is None else base_result
    plain = plain if base_layer.bias is None else plain - base_layer.bias
    turned = plain + lora_B(lora_A(inputs)) * scaling
    return turned * (layer.weight / lengths).to(turned.dtype) - plain


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name.endswith((FIRST, SECOND, LENGTHS))


def original_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(BASE, ".")


def merged(
    weight: torch.Tensor, section: AdapterSection, parts: dict[str, torch.Tensor], *, transposed: bool
) -> torch.Tensor:
    """A layer's weight with its adapter in it, fp32 in the shape that it has.

    Args:
        weight: [outputs, inputs], or [inputs, outputs] where it is ``transposed`` as GPT-2 has it.
        parts: ``FIRST`` [rank, inputs], ``SECOND`` [outputs, rank] and, of DoRA, ``LENGTHS`` [outputs].
    """
    added = section.scale * (parts[SECOND] @ parts[FIRST])
    found = (weight.t() if transposed else weight).float() + added
    if LENGTHS in parts:
        found = found * (parts[LENGTHS] / torch.linalg.norm(found, dim=1)).unsqueeze(1)
    return found.t().contiguous() if transposed else found
