"""The end of a run: its weights exported, loaded again and compared with the trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from raylm.errors import RunFailure
from raylm.models.lora import RUN_FOLDER
from raylm.models.weights import make_outline
from raylm.training.checkpoints.adapters import MergedWeights, write_adapter
from raylm.training.checkpoints.export import ExportedWeights, export_model, is_tolerated, reloaded_logits
from raylm.training.checkpoints.mirror import BOARD, METRICS, TRACKED
from raylm.training.checkpoints.store import CheckpointReader, whole_best
from raylm.training.loop.additions import rounding_of
from raylm.training.loop.averages import AveragedWeights
from raylm.training.loop.batches import to_tensors
from raylm.training.loop.four_bits import beside_original_logits, put_back_logits

if TYPE_CHECKING:
    from raylm.training.checkpoints.storage import Storage
    from raylm.training.loop.training_loop import TrainingLoop


def finish(loop: TrainingLoop) -> dict[str, Any]:
    """Export the last weights, or those of the best evaluation, reload them and compare; a collective.

    Returns:
        The run's final metrics.

    Raises:
        RunFailure: the reloaded model's logits differ from the trained one's.
    """
    if loop.worker.rank == 0 and loop.job.progress is not None:
        loop.job.progress.update.remote({"finishing": "exporting the model and comparing its outputs"})
    best = whole_best(loop.writer.root, *loop.ranks) if loop.config.training.restores_best else None
    source = best or loop.writer.root / str(loop.newest)
    last = loop.state
    reader = CheckpointReader(source)
    if reader.state["step"] != last["step"]:
        loop.load(reader)
    probe = to_tensors(loop.validation, np.arange(1), loop.device)
    with loop.averaged():
        expected = loop.engine.logits(probe).cpu()
    weights = reader if loop.averages is None else AveragedWeights(reader)
    difference = _export(loop, source, weights, probe, expected) if loop.worker.rank == 0 else None
    dist.barrier()
    return {
        "finished": True,
        "step": last["step"],
        "exported_step": reader.state["step"],
        "tokens": last["tokens"],
        # Of the weights that are exported.
        "validation_loss": reader.state.get("validation_loss"),
        **reader.state.get("measures", {}),
        "best_validation_loss": last["best_validation_loss"],
        "best": {"metric": last["metric"], "value": last["best"], "step": last["best_step"]},
        "logits_difference": difference,
        "stopped_early": last["step"] < loop.total_steps,
        "skipped": last["skipped"],
    }


def _export(
    loop: TrainingLoop,
    source: Storage,
    weights: ExportedWeights,
    probe: dict[str, torch.Tensor],
    expected: torch.Tensor,
) -> float:
    """On rank 0: write ``<run>/model`` and return how far its logits are from the ``expected`` ones."""
    loop.check_owner()
    computed = dtype = torch.bfloat16 if loop.bf16 else torch.float32
    output = loop.job.directory / "model"
    merged = None if loop.original is None else _merged(loop, weights)
    if merged is not None:
        # Rounding to fewer bits than the original has would lose much of what little an adapter adds.
        dtype = loop.model_config.dtype or torch.float32
    export_model(
        source, loop.model_config, loop.job.tokenizer_directory, output, dtype, loop.objective.head,
        loop.job.model_source, merged or weights,
    )  # fmt: skip
    on_cpu = {name: values.cpu() for name, values in probe.items()}
    found = reloaded_logits(output, loop.objective, on_cpu, rounding_of(loop.config))
    if loop.config.adapter is not None and loop.config.adapter.bits is not None:
        _check(output.with_name(RUN_FOLDER), put_back_logits(loop, probe), expected, computed)
        # The model on disk has the original weights under the adapter, not those in 4 bits.
        expected = beside_original_logits(loop, on_cpu)
        computed = torch.float32 if dtype == torch.float32 else torch.bfloat16
    difference = _check(output, found, expected, computed)
    loop.mirror.send("model", *([] if merged is None else [RUN_FOLDER]), METRICS, BOARD, *TRACKED)
    return difference


def _check(output: Path, found: torch.Tensor, expected: torch.Tensor, computed: torch.dtype) -> float:
    """How far logits of what was written are from the ``expected`` ones.

    Raises:
        RunFailure: further than is tolerated.
    """
    difference = float((found - expected).abs().max())
    if not is_tolerated(found, expected, computed):
        raise RunFailure(f"{output}: the reloaded model's logits differ from the trained one's by {difference}")
    return difference


def _merged(loop: TrainingLoop, weights: ExportedWeights) -> MergedWeights:
    """The weights with the adapter in them, which is written by itself too."""
    section, head, source = loop.config.adapter, loop.objective.head, loop.job.model_source
    assert section is not None and loop.original is not None and source is not None
    plain = make_outline(loop.model_config, head).model
    output = loop.job.directory / RUN_FOLDER
    write_adapter(weights, plain, section, head, source, loop.job.tokenizer_directory, output)
    return MergedWeights(weights, loop.original, plain, section)
