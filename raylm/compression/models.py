"""Models on their way through the steps: opened, counted, and saved again as Hugging Face directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from raylm.models.heads import Head

# Of the model before: its weights and shape are others now.
REPLACED = ("config.json", "*.safetensors", "*.safetensors.index.json", "openvino", "README.md")


def open_model(directory: Path, head: Head) -> PreTrainedModel:
    """The model in fp32."""
    from raylm.models.loading import load_model

    return load_model(directory, head=head).eval()


def parameters_of(config: PretrainedConfig, head: Head) -> int:
    """Parameters of a model of this configuration; tied ones count once."""
    from raylm.models.weights import make_outline

    return sum(parameter.numel() for parameter in make_outline(config, head).model.parameters())


def save_model(model: PreTrainedModel, source: Path, output: Path) -> None:
    """Write ``model`` with the tokenizer and all else of ``source`` into a new directory."""
    shutil.copytree(source, output, ignore=shutil.ignore_patterns(*REPLACED))
    model.save_pretrained(output)
