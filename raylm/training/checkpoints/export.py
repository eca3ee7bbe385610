"""A checkpoint to a Hugging Face directory, one tensor after the other, and the proof that it loads.

The weights come from the checkpoint's files, not from a live model, so that the export does not depend on the layout
and no process holds more than one shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PretrainedConfig

from raylm.data.loading import load_tokenizer
from raylm.models.families.build import build_empty
from raylm.models.heads import CAUSAL, Head
from raylm.models.loading import load_model
from raylm.models.stops import stop_tokens
from raylm.tasks.objective import Batch, Objective
from raylm.training.checkpoints.storage import Storage
from raylm.training.checkpoints.store import CheckpointReader

SHARD_BYTES = 2 * 1024**3
# Between logits of the reloaded and the trained model: absolute, and as a share of the largest one. Reloaded fp32
# weights are the same bits; kernels may still differ with the shape of the batch.
LOGITS_TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.5, 0.06)}
# Of a model of 135 million parameters with an adapter it was 0.10, and 0.06 without.
NOISE_SHARE = 0.2


class ExportedWeights(Protocol):
    """Whole weights, one after the other.

    Attributes:
        shapes: by their names, in the order in which they are written.
    """

    shapes: Mapping[str, Sequence[int]]

    def weight(self, name: str) -> torch.Tensor:
        """A weight, fp32."""


def export_model(
    checkpoint: Path | Storage,
    config: PretrainedConfig,
    tokenizer_directory: Path,
    output: Path,
    dtype: torch.dtype,
    head: Head = CAUSAL,
    source: str | None = None,
    weights: ExportedWeights | None = None,
) -> None:
    """Write ``output`` (config, safetensors, tokenizer, generation config) from ``checkpoint``; it appears whole.

    Args:
        weights: what is written; by default the checkpoint's.
        source: of the model that training began with, whose stop tokens stay.
        head: the model's head (:mod:`raylm.models.heads`).
        dtype: type of the weights on disk.
    """
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = type(config).from_dict(config.to_dict())
    config.dtype = dtype
    empty = build_empty(config, head)
    config.architectures = [type(empty).__name__]
    config.save_pretrained(partial)
    if head.own is not None:
        head.own.copy_code(partial)
    _write_weights(weights or CheckpointReader(checkpoint), partial, dtype)
    tokenizer = load_tokenizer(tokenizer_directory)
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        tokenizer.model_max_length = positions
    tokenizer.save_pretrained(partial)
    if empty.can_generate():
        stops = stop_tokens(tokenizer, source)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=stops if len(stops) > 1 else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        ).save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def _write_weights(reader: ExportedWeights, output: Path, dtype: torch.dtype) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in reader.shapes.items():
        length = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + length > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
        total += length
    weight_map = {}
    for index, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: reader.weight(name).to(dtype) for name in names}, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2))


def tolerated(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """How far logits of the reloaded model may be from ``expected``, of a model that computed in ``dtype``.

    In bf16 each number has an error in proportion to its size, and a larger model's logits are larger.
    """
    absolute, share = LOGITS_TOLERANCE[dtype]
    return max(absolute, share * float(expected.abs().max()))


def is_tolerated(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits of the reloaded model are the ``expected`` ones, of a model that computed in ``dtype``.

    Of millions of logits the largest error says little in bf16. What counts then is the root mean square, beside how
    much logits differ from each other.
    """
    difference = found - expected
    if float(difference.abs().max()) <= tolerated(expected, dtype):
        return True
    spread = (expected - expected.mean(dim=-1, keepdim=True)).pow(2).mean().sqrt()
    return dtype == torch.bfloat16 and bool(difference.pow(2).mean().sqrt() <= NOISE_SHARE * spread)


@torch.no_grad()
def reloaded_logits(
    output: Path,
    objective: Objective,
    batch: Batch,
    transform: Callable[[torch.nn.Module, str], None] | None = None,
) -> torch.Tensor:
    """The reloaded model's logits on a ``batch`` of ``objective``.

    Args:
        transform: what the engine did to the model before it was trained.
    """
    model = load_model(output, head=objective.head).eval()
    if transform is not None:
        transform(model, "")
    return objective.logits(model, batch)
