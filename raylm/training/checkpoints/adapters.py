"""Adapters of a checkpoint: merged into the weights that a run began with, and in peft's own format.

A checkpoint of such a run holds what is trained alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from raylm.config.adapter import AdapterSection
from raylm.data.loading import load_tokenizer
from raylm.models.adapters import BASE, FIRST, LENGTHS, NAME, SECOND, is_adapter, merged, peft_config
from raylm.models.heads import Head
from raylm.models.lora import PREFIX, WEIGHTS
from raylm.models.weights import Weights
from raylm.training.checkpoints.export import ExportedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MergedWeights:
    """The weights of a model with its adapter in them, one after the other.

    Args:
        reader: of the adapter.
        original: weights that the run began with.
        model: of their names and shapes; without memory.

    Attributes:
        shapes: of all weights by their names in the model.
    """

    def __init__(
        self, reader: ExportedWeights, original: Weights, model: PreTrainedModel, section: AdapterSection
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        self._reader, self._original, self._section = reader, original, section
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._transposed = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, Conv1D)}

    def weight(self, name: str) -> torch.Tensor:
        """A whole weight in fp32."""
        if name in self._reader.shapes:
            return self._reader.weight(name)
        weight, layer = self._original.open(name)[:], name.removesuffix(".weight")
        parts = {end: self._reader.weight(layer + end) for end in (FIRST, SECOND, LENGTHS) if self._has(layer + end)}
        if not parts:
            return weight
        return merged(weight, self._section, parts, transposed=name in self._transposed)

    def _has(self, name: str) -> bool:
        return name in self._reader.shapes


def _peft_name(name: str) -> str:
    """What peft's file calls a parameter that is trained."""
    key = name.removesuffix(".weight") if name.endswith(LENGTHS) else name
    return f"{PREFIX}{key.replace(f'.{NAME}', '')}"


@torch.no_grad()
def read_adapter(directory: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Give the parameters of a model with adapters, and of its own head, the values of an adapter that was written.

    Args:
        parameters: of the model by name; those that the file does not have stay.
    """
    state = load_file(directory / WEIGHTS)
    for name, parameter in parameters.items():
        if (values := state.pop(_peft_name(name), None)) is not None:
            parameter.copy_(values)
    assert not state, sorted(state)


def write_adapter(
    reader: ExportedWeights,
    model: PreTrainedModel,
    section: AdapterSection,
    head: Head,
    source: str,
    tokenizer_directory: Path,
    output: Path,
) -> None:
    """Write the adapter as ``PeftModel.from_pretrained`` reads it, with its tokenizer; the directory appears whole.

    Args:
        model: without adapters, and without memory.
        source: of the model that it belongs to.
    """
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    peft_config(section, model, head, source).save_pretrained(partial)
    # Its chat template, and what ends a turn, may be others than the model's.
    load_tokenizer(tokenizer_directory).save_pretrained(partial)
    state = {}
    for name in reader.shapes:
        assert is_adapter(name) or BASE not in name, name
        state[_peft_name(name)] = reader.weight(name).contiguous()
    save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
