"""``<run>/stages.json``: where pipeline stages begin, once measured, so that every start of a run cuts alike.

The bits of a loss depend on the cut, and no two measurements agree to the last. A checkpoint fits any cut.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raylm.config.run_directory import read_object, write_atomically
from raylm.config.stages import TrainConfig

FILE = "stages.json"


class MeasuredStages:
    """What was measured for one layout of one run.

    Args:
        directory: the run directory.
        model_config: the model's Hugging Face configuration.
    """

    def __init__(self, directory: Path, config: TrainConfig, model_config: Any) -> None:
        parallel, training = config.parallel, config.training
        self._path = directory / FILE
        self._layout = {
            "pipeline": parallel.pipeline,
            "tensor": parallel.tensor,
            "micro_batch_size": parallel.micro_batch_size,
            "activation_checkpointing": bool(parallel.activation_checkpointing),
            "sequence_length": training.sequence_length,
            "precision": training.precision,
            "model": model_config.model_type,
        }

    def known(self) -> list[int] | None:
        """Where the stages begin, if it was measured for this layout; a damaged file is measured anew."""
        found = read_object(self._path) or {}
        bounds = found.get("stage_bounds")
        if found.get("layout") != self._layout or not isinstance(bounds, list):
            return None
        whole = all(type(bound) is int for bound in bounds) and bounds == sorted({0, *bounds})
        return bounds if whole and len(bounds) == int(self._layout["pipeline"]) + 1 else None

    def note(self, stage_bounds: list[int]) -> None:
        """Keep what was measured."""
        write_atomically(self._path, json.dumps({"layout": self._layout, "stage_bounds": stage_bounds}))
