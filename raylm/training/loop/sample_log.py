"""Which samples a replica took: what shows that a run, however disturbed, saw each of them once."""

from __future__ import annotations

import json
import time
from pathlib import Path

from raylm.training.loop.batches import rank_samples
from raylm.training.loop.worker import Worker


class SampleLog:
    """The numbers of the samples that one replica took, a line a step: ``samples/<generation>.rank-<rank>.jsonl``."""

    def __init__(self, directory: Path, worker: Worker, data_rank: int, data_size: int) -> None:
        self._place = (data_rank, data_size)
        path = directory / "samples" / f"{worker.generation}.rank-{worker.rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("w", encoding="utf-8")

    def write(self, step: int, batch: int, batch_size: int) -> None:
        """Note what this replica takes in ``step``, which takes the ``batch``."""
        taken = rank_samples(batch, batch_size, *self._place).tolist()
        self._stream.write(json.dumps({"step": step, "samples": taken, "time": time.time()}) + "\n")
        self._stream.flush()
